//! Verifies the master's certificate by the configured rule, and builds the rustls configuration
//! for it. Handshakes run on the heartbeat thread.
//!
//! A resumed handshake sends no certificate. So session tickets belong to one configuration, with
//! one bundle and one rule. After a change of the rule there are no tickets.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore,
    SignatureScheme,
};

use crate::error::Error;
use crate::limits;
use crate::master::crypto::{PROVIDER, algorithms, verify_chain};
use crate::master::identity::{MasterIdentity, fingerprint, hex};
use crate::master::x509::X509;
use crate::text::quoted;

/// The common name and a DNS name of the master's own certificate. No other certificate of its CA
/// has them.
pub(crate) const MASTER_NAME: &str = "swarmctl";

/// The verifier for the certificate of `master`.
pub(crate) fn verifier(
    roots: &Arc<RootCertStore>,
    identity: MasterIdentity,
    master: &ServerName<'static>,
) -> Arc<dyn ServerCertVerifier> {
    let roots = match identity {
        MasterIdentity::PublicCa => {
            Arc::new(RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() })
        }
        _ => Arc::clone(roots),
    };
    Arc::new(MasterVerifier { roots, identity, host: master.clone() })
}

/// The configuration for one bundle and one rule. It contains the session tickets, so it is kept as
/// long as the bundle.
pub(crate) fn client_config(
    client: &Arc<CertifiedKey>,
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<Arc<ClientConfig>, Error> {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|source| {
            Error::setting("TLS", "the provider lacks TLS 1.2 or 1.3").with_source(source)
        })?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(client))));
    config.resumption = Resumption::in_memory_sessions(limits::TLS_SESSIONS);
    Ok(Arc::new(config))
}

/// Enforces a [`MasterIdentity`]. The request is sent only after the certificate is verified.
#[derive(Debug)]
struct MasterVerifier {
    roots: Arc<RootCertStore>,
    identity: MasterIdentity,
    host: ServerName<'static>,
}

impl MasterVerifier {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        verify_chain(end_entity, intermediates, &self.roots, now)?;
        let is_for_host =
            || verify_server_name(&ParsedCertificate::try_from(end_entity)?, &self.host);
        match self.identity {
            MasterIdentity::Name => Ok(is_masters_own(end_entity)?),
            MasterIdentity::Host if is_for_host().is_ok() => Ok(()),
            MasterIdentity::Host => Ok(is_masters_own(end_entity).map_err(Refusal::or_host)?),
            MasterIdentity::PublicCa => is_for_host(),
            MasterIdentity::AnyFromCa | MasterIdentity::Fingerprint(_) => Ok(()),
        }
    }

    /// Replaces an error of webpki with a more specific one. webpki does not know the rule, and
    /// does not tell why it could not verify a signature, such as an issuer's key that is too
    /// small. It also checks the dates of a certificate before it checks whether its CA is a root.
    fn explain(
        &self,
        error: rustls::Error,
        shown: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> rustls::Error {
        let unknown_issuer = || match self.identity {
            MasterIdentity::PublicCa => Refusal::NotPublic.into(),
            _ => CertificateError::UnknownIssuer.into(),
        };
        // webpki cannot parse it, either, and the error is about that.
        let Some(certificate) = X509::parse(shown) else { return error };
        let issuers: Vec<_> = others.iter().filter_map(|other| X509::parse(other)).collect();
        if !self.may_chain_to_a_root(&certificate, &issuers) {
            return unknown_issuer();
        }
        if is_about_an_issuer(&error)
            && let Some(issuer) =
                issuers.iter().find(|it| !it.is_self_issued() && it.not_a_ca().is_some())
        {
            return Refusal::NotACa(issuer.common_name().unwrap_or_default()).into();
        }
        if let Some(refusal) = issuer_dates(&error, shown, others, now) {
            return refusal.into();
        }
        #[expect(deprecated, reason = "webpki may still return it")]
        let is_unverified = matches!(
            error,
            rustls::Error::InvalidCertificate(
                CertificateError::BadSignature
                    | CertificateError::UnsupportedSignatureAlgorithm
                    | CertificateError::UnsupportedSignatureAlgorithmContext { .. }
                    | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. }
            )
        );
        if is_unverified && let Some(problem) = unsupported(&certificate, &issuers) {
            return Refusal::Unsupported(problem).into();
        }
        let is_bad = error == CertificateError::BadSignature.into();
        // The root with the issuer's name has a key of another type, so it is another CA.
        let is_of_another_ca =
            is_unverified && !is_bad || error == CertificateError::UnknownIssuer.into();
        if is_of_another_ca || is_bad && self.identity == MasterIdentity::PublicCa {
            unknown_issuer()
        } else {
            error
        }
    }

    /// Whether the names of the issuers lead to a root. Signatures are not checked.
    fn may_chain_to_a_root(&self, shown: &X509<'_>, issuers: &[X509<'_>]) -> bool {
        let roots = &self.roots.roots;
        if shown.is_self_issued() {
            return shown.is_a_root(roots);
        }
        let mut left: Vec<_> = issuers.iter().collect();
        let mut chain = vec![shown];
        while let Some(certificate) = chain.pop() {
            if certificate.names_a_root_as_issuer(roots) {
                return true;
            }
            chain.extend(left.extract_if(.., |issuer| certificate.names_as_issuer(issuer)));
        }
        false
    }
}

/// The refusal for an error about dates that are those of an issuer, and not those of the peer's
/// certificate.
fn issuer_dates(
    error: &rustls::Error,
    shown: &CertificateDer<'_>,
    others: &[CertificateDer<'_>],
    now: UnixTime,
) -> Option<Refusal> {
    use CertificateError as Bad;
    let rustls::Error::InvalidCertificate(
        bad @ (Bad::Expired | Bad::ExpiredContext { .. } | Bad::NotValidYetContext { .. }),
    ) = error
    else {
        return None;
    };
    // webpki checks the dates first, with any roots.
    let roots = RootCertStore::empty();
    let has_error = |certificate: &CertificateDer<'_>| {
        verify_chain(certificate, &[], &roots, now).as_ref() == Err(error)
    };
    let issuer = others.iter().find(|other| !has_error(shown) && has_error(other))?;
    let name = X509::parse(issuer).and_then(|issuer| issuer.common_name()).unwrap_or_default();
    Some(Refusal::OfIssuer { name, bad: bad.clone() })
}

/// Why the signature of the certificate, or the key or signature of an issuer, cannot be verified
/// here.
fn unsupported(shown: &X509<'_>, issuers: &[X509<'_>]) -> Option<String> {
    if let Some(problem) = shown.unsupported_signature() {
        return Some(format!("the master's certificate cannot be verified: {problem}"));
    }
    // A root that the peer sends is not verified.
    let mut verified = issuers.iter().filter(|issuer| !issuer.is_self_issued());
    let problem =
        verified.find_map(|it| it.unsupported_key().or_else(|| it.unsupported_signature()))?;
    Some(format!("an issuer of the master's certificate cannot be verified: {problem}"))
}

/// Whether an issuer may not issue certificates. rustls passes these errors of webpki on unchanged.
fn is_about_an_issuer(error: &rustls::Error) -> bool {
    let rustls::Error::InvalidCertificate(CertificateError::Other(other)) = error else {
        return false;
    };
    ["EndEntityUsedAsCa", "UnsupportedCertVersion"].contains(&other.to_string().as_str())
}

/// Checks that the certificate is the master's own: its only common name and one of its DNS names
/// are [`MASTER_NAME`].
pub(crate) fn is_masters_own(certificate: &CertificateDer<'_>) -> Result<(), Refusal> {
    let refusal = |problem| Refusal::NotMasters { problem, or_host: false };
    let Some(certificate) = X509::parse(certificate) else {
        return Err(refusal("it cannot be parsed".to_owned()));
    };
    if !certificate.has_common_name(MASTER_NAME) {
        return Err(refusal(match certificate.common_names().as_slice() {
            [] => format!("it has no common name, and needs the common name {MASTER_NAME:?}"),
            [name] if name.text == MASTER_NAME => format!(
                "its common name {MASTER_NAME:?} is {}, and must be a UTF8String or a PrintableString",
                name.kind
            ),
            [name] => format!(
                "its common name is {}, and must be {MASTER_NAME:?}",
                quoted(&name.text, limits::LOG_TEXT / 2)
            ),
            names => {
                format!("it has {} common names, and must have only {MASTER_NAME:?}", names.len())
            }
        }));
    }
    if !certificate.has_dns_name(MASTER_NAME) {
        return Err(refusal(format!(
            "its common name is {MASTER_NAME:?}, but it has no DNS name {MASTER_NAME:?}"
        )));
    }
    Ok(())
}

/// Why this crate rejects a certificate of the peer that rustls would accept, or cannot explain.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Refusal {
    /// The CA issued the certificate, but not for the master. `or_host`: it is not valid for the
    /// configured host, either.
    NotMasters { problem: String, or_host: bool },
    /// The rule is `public`, and no public CA issued the certificate.
    NotPublic,
    /// The issuer, with this common name, is not a CA.
    NotACa(String),
    /// An issuer, with this common name, has expired or is not yet valid.
    OfIssuer { name: String, bad: CertificateError },
    /// The key or the signature is of an unsupported type.
    Unsupported(String),
    /// The peer did not sign the handshake with the key of its certificate.
    NotItsKey,
}

impl Refusal {
    fn or_host(self) -> Self {
        match self {
            Self::NotMasters { problem, .. } => Self::NotMasters { problem, or_host: true },
            other => other,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMasters { problem, or_host } => {
                write!(f, "the certificate is not the master's own: {problem}")?;
                if *or_host {
                    f.write_str("; and it is not valid for the configured host")
                } else {
                    Ok(())
                }
            }
            Self::NotPublic => f.write_str(
                "the certificate is not issued by a public CA, which the rule public requires",
            ),
            Self::NotACa(name) => write!(
                f,
                "the master's certificate is issued by {}, which is not a CA: another host may impersonate the master",
                quoted(name, limits::LOG_TEXT / 2)
            ),
            Self::OfIssuer { name, bad } => {
                let name = quoted(name, limits::LOG_TEXT / 2);
                write!(f, "an issuer of the master's certificate, {name}, is not valid: {bad}")
            }
            Self::Unsupported(problem) => f.write_str(problem),
            Self::NotItsKey => f.write_str("the peer does not have the key of its certificate"),
        }
    }
}

impl StdError for Refusal {}

/// Wraps the refusal in an error of rustls. `explain` extracts it.
impl From<Refusal> for rustls::Error {
    fn from(refusal: Refusal) -> Self {
        CertificateError::Other(OtherError(Arc::new(refusal))).into()
    }
}

/// A bad signature in the handshake is that of the peer, not of an issuer.
fn of_handshake(error: rustls::Error) -> rustls::Error {
    if error == CertificateError::BadSignature.into() { Refusal::NotItsKey.into() } else { error }
}

impl ServerCertVerifier for MasterVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.identity {
            // The issuer of a pinned certificate is not checked.
            MasterIdentity::Fingerprint(pinned) if fingerprint(end_entity) == hex(&pinned) => (),
            MasterIdentity::Fingerprint(_) => {
                return Err(CertificateError::ApplicationVerificationFailure.into());
            }
            _ => self
                .check(end_entity, intermediates, now)
                .map_err(|error| self.explain(error, end_entity, intermediates, now))?,
        }
        // Otherwise the handshake would fail with a bad signature, as the signature of such a key
        // cannot be verified.
        if let Some(problem) = X509::parse(end_entity).and_then(|shown| shown.unsupported_key()) {
            return Err(Refusal::Unsupported(format!(
                "the master's certificate cannot be used: {problem}"
            ))
            .into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &algorithms()).map_err(of_handshake)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &algorithms()).map_err(of_handshake)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

#[cfg(test)]
#[cfg(feature = "loopback")]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, CustomExtension, DistinguishedName,
        DnType, DnValue, GeneralSubtree, IsCa, KeyPair, NameConstraints,
    };

    use super::*;
    use crate::master::explain::{self, Explained};

    /// Why a certificate with this common name and these DNS names is not the master's own.
    fn refusal_of(common_name: Option<&str>, dns_names: &[&str]) -> Option<String> {
        let names: Vec<_> = dns_names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = DistinguishedName::new();
        common_name
            .into_iter()
            .for_each(|name| params.distinguished_name.push(DnType::CommonName, name));
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        is_masters_own(certificate.der()).err().map(|refusal| refusal.to_string())
    }

    #[test]
    fn common_name_and_dns_name_are_both_required() {
        assert_eq!(refusal_of(Some("swarmctl"), &["localhost", "swarmctl"]), None);
        for (common_name, dns_names, expected) in [
            (
                Some("swarmctl"),
                &["localhost"][..],
                "its common name is \"swarmctl\", but it has no DNS name \"swarmctl\"",
            ),
            (
                Some("swarmctl"),
                &["*"],
                "its common name is \"swarmctl\", but it has no DNS name \"swarmctl\"",
            ),
            (Some("w\n"), &["swarmctl"], "its common name is \"w\\n\", and must be \"swarmctl\""),
            (
                Some("swarmctl "),
                &["swarmctl"],
                "its common name is \"swarmctl \", and must be \"swarmctl\"",
            ),
            (None, &["swarmctl"], "it has no common name, and needs the common name \"swarmctl\""),
        ] {
            let text = refusal_of(common_name, dns_names).unwrap();
            assert_eq!(text, format!("the certificate is not the master's own: {expected}"));
        }
    }

    #[test]
    fn common_name_of_another_type_or_a_second_one_is_refused() {
        let ours = "swarmctl";
        let type_of = |kind: &str| {
            format!(
                "its common name \"swarmctl\" is {kind}, and must be a UTF8String or a PrintableString"
            )
        };
        for (names, expected) in [
            (vec![DnValue::Ia5String(ours.try_into().unwrap())], type_of("an IA5String")),
            (vec![DnValue::TeletexString(ours.try_into().unwrap())], type_of("a T61String")),
            (vec![DnValue::BmpString(ours.try_into().unwrap())], type_of("a BMPString")),
            (
                vec![DnValue::UniversalString(ours.try_into().unwrap())],
                type_of("a UniversalString"),
            ),
            (
                vec![DnValue::BmpString("w".try_into().unwrap())],
                "its common name is \"w\", and must be \"swarmctl\"".to_owned(),
            ),
            (
                vec![DnValue::Utf8String(ours.to_owned()), DnValue::Utf8String(ours.to_owned())],
                "it has 2 common names, and must have only \"swarmctl\"".to_owned(),
            ),
        ] {
            let mut params = params(ours, &[ours]);
            params.distinguished_name = DistinguishedName::new();
            for (number, name) in names.into_iter().enumerate() {
                // rcgen keeps one name of a type: the second is of a type with the same OID.
                let kind = if number == 0 {
                    DnType::CommonName
                } else {
                    DnType::CustomDnType(vec![2, 5, 4, 3])
                };
                params.distinguished_name.push(kind, name);
            }
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            let text = is_masters_own(certificate.der()).unwrap_err().to_string();
            assert_eq!(text, format!("the certificate is not the master's own: {expected}"));
        }
    }

    fn params(common_name: &str, dns_names: &[&str]) -> CertificateParams {
        let names: Vec<_> = dns_names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params
    }

    /// A CA with this name and its own P-256 key.
    fn ca(common_name: &str) -> CertificateParams {
        let mut params = params(common_name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    }

    type Issuer = CertifiedIssuer<'static, KeyPair>;

    fn root(params: CertificateParams) -> Issuer {
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    fn sub(params: CertificateParams, issuer: &Issuer) -> Issuer {
        CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), issuer).unwrap()
    }

    /// The explanation of why `master` is refused, with the certificates that it sends.
    fn refused_under(
        identity: MasterIdentity,
        root: &Issuer,
        master: CertificateParams,
        issuer: Option<&Issuer>,
        others: &[&Issuer],
    ) -> explain::Explained {
        let key = KeyPair::generate().unwrap();
        let shown = match issuer {
            Some(issuer) => master.signed_by(&key, issuer).unwrap(),
            None => master.self_signed(&key).unwrap(),
        };
        let mut roots = RootCertStore::empty();
        roots.add(root.der().clone()).unwrap();
        let verifier = MasterVerifier {
            roots: Arc::new(roots),
            identity,
            host: ServerName::try_from("127.0.0.1").unwrap(),
        };
        let others: Vec<_> = others.iter().map(|other| other.der().clone()).collect();
        let result =
            verifier.verify_server_cert(shown.der(), &others, &verifier.host, &[], UnixTime::now());
        explain::handshake(&std::io::Error::other(result.unwrap_err()))
    }

    fn refused(
        root: &Issuer,
        master: CertificateParams,
        issuer: Option<&Issuer>,
        others: &[&Issuer],
    ) -> explain::Explained {
        refused_under(MasterIdentity::Name, root, master, issuer, others)
    }

    fn ended(mut params: CertificateParams) -> CertificateParams {
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2002, 1, 1);
        params
    }

    #[test]
    fn certificate_of_another_ca_is_reported_as_such_first() {
        let ours = root(ca("ours"));
        let other = root(ca("other"));
        let sub_of_other = sub(ca("sub"), &other);
        let named_as_ours = root(ca("ours"));
        for (master, issuer, others) in [
            // As `openssl req -x509` makes one.
            (ca("proxy"), None, &[][..]),
            (ended(ca("proxy")), None, &[]),
            // Self-issued, with the name of our CA.
            (ca("ours"), None, &[]),
            (ended(params("m", &["m"])), Some(&other), &[]),
            (ended(params("m", &["m"])), Some(&other), &[&other]),
            (ended(params("m", &["m"])), Some(&sub_of_other), &[&sub_of_other, &other]),
        ] {
            let Explained { text, advice } = refused(&ours, master.clone(), issuer, others);
            assert!(
                text.starts_with("the master's certificate is not issued by the CA in ca.crt"),
                "{text}"
            );
            assert!(advice.contains("must pass TLS through"), "{advice}");
            let text = refused_under(MasterIdentity::PublicCa, &ours, master, issuer, others).text;
            assert!(text.starts_with("the certificate is not issued by a public CA"), "{text}");
        }
        // For a certificate of a CA with the same name, the dates are checked first.
        let text = refused(&ours, ended(params("m", &["m"])), Some(&named_as_ours), &[]).text;
        assert!(text.starts_with("the master's certificate has expired"), "{text}");
    }

    #[test]
    fn ca_of_same_name_with_another_key_type_is_another_ca() {
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let other = CertifiedIssuer::self_signed(ca("DECNET"), key).unwrap();
        let text = refused(&root(ca("DECNET")), params("m", &["m"]), Some(&other), &[]).text;
        assert_eq!(
            text,
            "the master's certificate is not issued by the CA in ca.crt (invalid peer certificate: UnknownIssuer)"
        );
    }

    #[test]
    fn violated_chain_rule_is_named() {
        let ours = root(ca("ours"));
        let thief = sub(params("worker-07", &[]), &ours);
        let explained = refused(&ours, params("swarmctl", &["swarmctl"]), Some(&thief), &[&thief]);
        assert_eq!(
            explained.text,
            "the master's certificate is issued by \"worker-07\", which is not a CA: another host may impersonate the master"
        );
        assert!(explained.advice.starts_with("find out which host answers"), "{explained:?}");
        let mut short = ca("short");
        short.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let short = sub(short, &ours);
        let below = sub(ca("below"), &short);
        let mut fenced = ca("fenced");
        let permitted_subtrees = vec![GeneralSubtree::DnsName("lan".to_owned())];
        fenced.name_constraints =
            Some(NameConstraints { permitted_subtrees, excluded_subtrees: Vec::new() });
        let fenced = sub(fenced, &ours);
        let mut unknown = params("swarmctl", &["swarmctl"]);
        let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
        extension.set_criticality(true);
        unknown.custom_extensions = vec![extension];
        let own = || params("swarmctl", &["swarmctl"]);
        for (master, issuer, others, expected) in [
            (own(), &below, &[&below, &short][..], "has more CAs than one of them allows"),
            (
                own(),
                &fenced,
                &[&fenced],
                "the master's certificate has a name that its CA may not issue",
            ),
            (unknown, &ours, &[], "has an unknown critical extension"),
        ] {
            let text = refused(&ours, master, Some(issuer), others).text;
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn date_error_names_the_certificate_at_fault() {
        let ours = root(ca("ours"));
        let old = sub(ended(ca("old")), &ours);
        let text = refused(&ours, params("swarmctl", &["swarmctl"]), Some(&old), &[&old]).text;
        assert!(
            text.starts_with(
                "an issuer of the master's certificate, \"old\", has expired by this host's"
            ),
            "{text}"
        );
        let text =
            refused(&ours, ended(params("swarmctl", &["swarmctl"])), Some(&old), &[&old]).text;
        assert!(
            text.starts_with("the master's certificate has expired by this host's clock"),
            "{text}"
        );
        let mut never = params("swarmctl", &["swarmctl"]);
        std::mem::swap(&mut never.not_before, &mut never.not_after);
        let text = refused(&ours, never, Some(&ours), &[]).text;
        assert_eq!(text, "the master's certificate is never valid: it ends before it begins");
    }
}
