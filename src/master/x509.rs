//! Reads the parts of a certificate or a key that webpki does not expose: the common names of the
//! subject, whether the certificate is a CA certificate, and its algorithms. Values only, for any
//! thread.
//!
//! It uses ring's DER reader, which is strict and already a dependency. Nothing here replaces a
//! check of webpki: only webpki builds chains and verifies dates, purposes and signatures.

use ring::error::Unspecified;
use ring::io::der::{self, Tag};
use rustls::pki_types::{PrivateKeyDer, TrustAnchor};
use untrusted::{Input, Reader};

use crate::master::crypto::algorithms;

/// The supported keys, for an error.
const SUPPORTED_KEYS: &str = "supported are RSA of 2048, 3072 or 4096 bits (exponent 65537 and up), ECDSA on P-256 or P-384, and Ed25519";

/// The supported signatures of certificates, for an error.
const SUPPORTED_SIGNATURES: &str = "supported are RSA with SHA-256, SHA-384 or SHA-512, ECDSA with SHA-256 or SHA-384, and Ed25519";

const TAG_SET: u8 = 0x31;
const TAG_VERSION: u8 = 0xa0;
const TAG_EXTENSIONS: u8 = 0xa3;
const TAG_PARAMETERS: u8 = 0xa0;
const TAG_UTF8_STRING: u8 = 0x0c;
const TAG_PRINTABLE_STRING: u8 = 0x13;
const TAG_T61_STRING: u8 = 0x14;
const TAG_IA5_STRING: u8 = 0x16;
const TAG_UNIVERSAL_STRING: u8 = 0x1c;
const TAG_BMP_STRING: u8 = 0x1e;
const TAG_BOOLEAN: u8 = 0x01;
const TAG_DNS_NAME: u8 = 0x82;

const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
const ALTERNATIVE_NAME: &[u8] = &[0x55, 0x1d, 0x11];
const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];

/// The OID of the key type and of the signature.
const ED25519: &[u8] = &[0x2b, 0x65, 0x70];

/// The beginning of basic constraints: the boolean `cA` is true.
const CA_IS_TRUE: &[u8] = &[TAG_BOOLEAN, 1, 0xff];

/// The bit `keyCertSign`: bit 5 of the key usage.
const KEY_CERT_SIGN: u8 = 0b0000_0100;

/// Parts of a certificate. Each is DER without its tag and length, unless documented otherwise.
pub(crate) struct X509<'a> {
    /// The signed part, with tag and length.
    signed: &'a [u8],
    signature_algorithm: &'a [u8],
    signature: &'a [u8],
    is_v1: bool,
    issuer: &'a [u8],
    subject: &'a [u8],
    /// The public key with its algorithm.
    public_key: &'a [u8],
    key_algorithm: &'a [u8],
    key: &'a [u8],
    /// The OID and the value of each.
    extensions: Vec<(&'a [u8], &'a [u8])>,
}

/// A common name as text. It is foreign text and must be escaped.
pub(crate) struct CommonName {
    tag: u8,
    pub(crate) text: String,
    /// The type of the string: `an IA5String`.
    pub(crate) kind: &'static str,
}

/// The type of a public key, and whether it is supported.
struct Key {
    /// A description: `an RSA key of 1024 bits`.
    name: String,
    is_supported: bool,
}

impl<'a> X509<'a> {
    /// Parses a certificate. `None`: webpki cannot parse it, either.
    pub(crate) fn parse(der: &'a [u8]) -> Option<Self> {
        read(der, |input| read(sequence(input)?, Self::certificate)).ok()
    }

    fn certificate(input: &mut Reader<'a>) -> Result<Self, Unspecified> {
        let (signed, fields) = input.read_partial(|input| sequence(input))?;
        let signature_algorithm = sequence(input)?;
        let signature = bit_string(input)?;
        read(fields, |input| {
            // Only a version 1 certificate has no version field.
            let is_v1 = !input.peek(TAG_VERSION);
            if !is_v1 {
                any(input)?;
            }
            value(input, Tag::Integer)?;
            sequence(input)?;
            let issuer = sequence(input)?;
            sequence(input)?;
            let subject = sequence(input)?;
            let public_key = sequence(input)?;
            let (key_algorithm, key) =
                read(public_key, |input| Ok((sequence(input)?, bit_string(input)?)))?;
            let mut extensions = Vec::new();
            while !input.at_end() {
                // The unique identifiers are not used.
                if let (TAG_EXTENSIONS, list) = any(input)? {
                    extensions = read(list, |input| items(sequence(input)?, extension))?;
                }
            }
            Ok(Self {
                signed: signed.as_slice_less_safe(),
                signature_algorithm,
                signature,
                is_v1,
                issuer,
                subject,
                public_key,
                key_algorithm,
                key,
                extensions,
            })
        })
    }

    /// Whether the subject has exactly one common name, and it is `name`.
    ///
    /// The check is strict, because this name identifies the master: a second common name, another
    /// case, or a string type other than `UTF8String` and `PrintableString` (the two that RFC 5280,
    /// 4.1.2.4, allows a CA to use) does not match.
    pub(crate) fn has_common_name(&self, name: &str) -> bool {
        let is_name = |only: &CommonName| {
            [TAG_UTF8_STRING, TAG_PRINTABLE_STRING].contains(&only.tag) && only.text == name
        };
        matches!(self.common_names().as_slice(), [only] if is_name(only))
    }

    /// The subject's first common name. It is foreign text and must be escaped.
    pub(crate) fn common_name(&self) -> Option<String> {
        self.common_names().into_iter().next().map(|name| name.text)
    }

    /// Every common name of the subject, from all RDNs. Empty if the subject cannot be parsed.
    pub(crate) fn common_names(&self) -> Vec<CommonName> {
        let attribute = |input: &mut Reader<'a>| {
            read(sequence(input)?, |input| Ok((value(input, Tag::OID)?, any(input)?)))
        };
        let rdn = |input: &mut Reader<'a>| match any(input)? {
            (TAG_SET, set) => items(set, attribute),
            _ => Err(Unspecified),
        };
        let attributes = items(self.subject, rdn).unwrap_or_default().into_iter().flatten();
        let names = attributes.filter(|(oid, _)| *oid == COMMON_NAME);
        names.map(|(_, (tag, bytes))| CommonName::of(tag, bytes)).collect()
    }

    /// Whether `name` is one of the DNS names, byte for byte. A wildcard does not match.
    pub(crate) fn has_dns_name(&self, name: &str) -> bool {
        let list = self.extension(ALTERNATIVE_NAME).unwrap_or_default();
        let names = read(list, |input| items(sequence(input)?, any)).unwrap_or_default();
        names.contains(&(TAG_DNS_NAME, name.as_bytes()))
    }

    /// Why this is not a CA certificate. The rule is that of OpenSSL (`check_ca` in `v3_purp.c`),
    /// with only one of its exceptions for certificates without basic constraints: a self-signed
    /// certificate of version 1, which cannot have them, is a root.
    pub(crate) fn not_a_ca(&self) -> Option<&'static str> {
        if self.is_v1 {
            return (!self.is_self_signed())
                .then_some("a certificate of version 1 that is not self-signed");
        }
        let constraints = self.extension(BASIC_CONSTRAINTS).unwrap_or_default();
        let is_ca = read(constraints, sequence).is_ok_and(|list| list.starts_with(CA_IS_TRUE));
        if !is_ca {
            return Some("a certificate that is not marked as a CA");
        }
        // The first byte is the number of unused bits.
        let may_sign = self.extension(KEY_USAGE).is_none_or(|usage| {
            let bits = read(usage, |input| value(input, Tag::BitString)).unwrap_or_default();
            bits.get(1).is_some_and(|bits| bits & KEY_CERT_SIGN != 0)
        });
        (!may_sign)
            .then_some("a CA certificate whose key usage does not allow issuing certificates")
    }

    /// Whether issuer and subject have the same name and the certificate's own key made the
    /// signature. A signature with an unsupported algorithm, such as that of an old root with
    /// SHA-1, counts as self-signed: OpenSSL does not verify the signature of a root.
    fn is_self_signed(&self) -> bool {
        let mut verifiers = algorithms().all.iter().filter(|algorithm| {
            algorithm.signature_alg_id().as_ref() == self.signature_algorithm
                && algorithm.public_key_alg_id().as_ref() == self.key_algorithm
        });
        self.is_self_issued()
            && verifiers
                .next()
                .is_none_or(|it| it.verify_signature(self.key, self.signed, self.signature).is_ok())
    }

    /// Why the key is not supported: `its key is an RSA key of 1024 bits; supported are …`. `None`:
    /// it is supported.
    pub(crate) fn unsupported_key(&self) -> Option<String> {
        let key = public_key(self.key_algorithm, self.key).ok()?;
        (!key.is_supported).then(|| format!("its key is {}; {SUPPORTED_KEYS}", key.name))
    }

    /// Why the signature is not supported: `it is signed with RSA and SHA-1; supported are …`.
    /// `None`: it is supported.
    pub(crate) fn unsupported_signature(&self) -> Option<String> {
        let algorithm = self.signature_algorithm;
        let is_supported =
            algorithms().all.iter().any(|it| it.signature_alg_id().as_ref() == algorithm);
        let name = signature_name(algorithm);
        (!is_supported).then(|| format!("it is signed with {name}; {SUPPORTED_SIGNATURES}"))
    }

    /// Whether issuer and subject have the same name.
    pub(crate) fn is_self_issued(&self) -> bool {
        self.issuer == self.subject
    }

    /// Whether `issuer` has the name of this certificate's issuer. The signature is not checked.
    pub(crate) fn names_as_issuer(&self, issuer: &X509<'_>) -> bool {
        self.issuer == issuer.subject
    }

    /// Whether a root has the name of this certificate's issuer.
    pub(crate) fn names_a_root_as_issuer(&self, roots: &[TrustAnchor<'_>]) -> bool {
        roots.iter().any(|root| root.subject.as_ref() == self.issuer)
    }

    /// Whether this certificate has the name and the key of a root.
    pub(crate) fn is_a_root(&self, roots: &[TrustAnchor<'_>]) -> bool {
        roots.iter().any(|root| {
            root.subject.as_ref() == self.subject
                && root.subject_public_key_info.as_ref() == self.public_key
        })
    }

    fn extension(&self, oid: &[u8]) -> Option<&'a [u8]> {
        self.extensions.iter().find(|(known, _)| *known == oid).map(|(_, value)| *value)
    }
}

impl CommonName {
    fn of(tag: u8, bytes: &[u8]) -> Self {
        let text = || String::from_utf8_lossy(bytes).into_owned();
        let utf16 = || {
            let units: Vec<_> =
                bytes.as_chunks().0.iter().copied().map(u16::from_be_bytes).collect();
            String::from_utf16_lossy(&units)
        };
        let utf32 = || {
            let scalars = bytes.as_chunks().0.iter().copied().map(u32::from_be_bytes);
            scalars.map(|c| char::from_u32(c).unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
        };
        let (kind, text) = match tag {
            TAG_UTF8_STRING => ("a UTF8String", text()),
            TAG_PRINTABLE_STRING => ("a PrintableString", text()),
            TAG_IA5_STRING => ("an IA5String", text()),
            TAG_T61_STRING => ("a T61String", text()),
            TAG_BMP_STRING => ("a BMPString", utf16()),
            TAG_UNIVERSAL_STRING => ("a UniversalString", utf32()),
            _ => ("a string of another type", text()),
        };
        Self { tag, text, kind }
    }
}

/// Why a private key is not supported: `is an RSA key of 1024 bits; supported are …`. `None`: it is
/// supported, or it cannot be parsed.
pub(crate) fn unsupported_private_key(key: &PrivateKeyDer<'_>) -> Option<String> {
    let key = match key {
        PrivateKeyDer::Pkcs1(key) => rsa_private(key.secret_pkcs1_der()),
        PrivateKeyDer::Pkcs8(key) => pkcs8(key.secret_pkcs8_der()),
        PrivateKeyDer::Sec1(key) => sec1(key.secret_sec1_der()),
        _ => return None,
    }
    .ok()?;
    (!key.is_supported).then(|| format!("is {}; {SUPPORTED_KEYS}", key.name))
}

/// The first value of `der`, with its tag and length.
pub(crate) fn first_value(der: &[u8]) -> Option<&[u8]> {
    let (first, _) = Reader::new(Input::from(der)).read_partial(|input| any(input)).ok()?;
    Some(first.as_slice_less_safe())
}

fn extension<'a>(input: &mut Reader<'a>) -> Result<(&'a [u8], &'a [u8]), Unspecified> {
    read(sequence(input)?, |input| {
        let oid = value(input, Tag::OID)?;
        if input.peek(TAG_BOOLEAN) {
            any(input)?;
        }
        Ok((oid, value(input, Tag::OctetString)?))
    })
}

fn public_key(algorithm: &[u8], key: &[u8]) -> Result<Key, Unspecified> {
    let rsa = |input: &mut Reader<'_>| {
        Ok(Key::rsa(integer(input)?, integer(input)?, |bits| (2048..=8192).contains(&bits), 3))
    };
    Key::of(algorithm, || read(read(key, sequence)?, rsa))
}

fn pkcs8(der: &[u8]) -> Result<Key, Unspecified> {
    read_some(read(der, sequence)?, |input| {
        value(input, Tag::Integer)?;
        let algorithm = sequence(input)?;
        let key = value(input, Tag::OctetString)?;
        Key::of(algorithm, || rsa_private(key))
    })
}

fn rsa_private(der: &[u8]) -> Result<Key, Unspecified> {
    // ring signs with fewer sizes than it verifies: each prime must have a multiple of 512 bits.
    let has_size = |bits| matches!(bits, 2048 | 3072 | 4096);
    read_some(read(der, sequence)?, |input| {
        value(input, Tag::Integer)?;
        Ok(Key::rsa(integer(input)?, integer(input)?, has_size, 65_537))
    })
}

fn sec1(der: &[u8]) -> Result<Key, Unspecified> {
    read_some(read(der, sequence)?, |input| {
        value(input, Tag::Integer)?;
        value(input, Tag::OctetString)?;
        match any(input)? {
            (TAG_PARAMETERS, parameters) => Ok(Key::on_curve(parameters)),
            _ => Err(Unspecified),
        }
    })
}

impl Key {
    /// The type of a key, from the contents of its `AlgorithmIdentifier`. For RSA, `rsa` decides.
    fn of(
        algorithm: &[u8],
        rsa: impl FnOnce() -> Result<Self, Unspecified>,
    ) -> Result<Self, Unspecified> {
        let (oid, parameters) = read(algorithm, |input| {
            Ok((value(input, Tag::OID)?, input.read_bytes_to_end().as_slice_less_safe()))
        })?;
        let name = match oid {
            [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01] => return rsa(),
            [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01] => return Ok(Self::on_curve(parameters)),
            [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a] => "an RSA key for RSA-PSS only",
            [0x2a, 0x86, 0x48, 0xce, 0x38, 0x04, 0x01] => "a DSA key",
            ED25519 => "an Ed25519 key",
            [0x2b, 0x65, 0x71] => "an Ed448 key",
            [0x2b, 0x65, 0x6e | 0x6f] => "a key for key agreement, which cannot sign",
            _ => "a key of an unknown type",
        };
        Ok(Self { name: name.to_owned(), is_supported: oid == ED25519 })
    }

    fn rsa(
        modulus: &[u8],
        exponent: &[u8],
        has_size: impl Fn(usize) -> bool,
        least_exponent: u64,
    ) -> Self {
        let leading = modulus.first().map_or(0, |byte| byte.leading_zeros() as usize);
        let bits = (modulus.len() * 8).saturating_sub(leading);
        let exponent = exponent
            .iter()
            .fold(0_u64, |number, byte| number.saturating_mul(256).saturating_add((*byte).into()));
        let has_size = has_size(bits);
        let name = match has_size {
            true if exponent < least_exponent => format!("an RSA key with the exponent {exponent}"),
            _ => format!("an RSA key of {bits} bits"),
        };
        Self { name, is_supported: has_size && exponent >= least_exponent }
    }

    /// The type of an elliptic curve key, from its parameters.
    fn on_curve(parameters: &[u8]) -> Self {
        let curve = read(parameters, |input| value(input, Tag::OID));
        let (name, is_supported) = match curve.unwrap_or_default() {
            [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07] => ("P-256", true),
            [0x2b, 0x81, 0x04, 0x00, 0x22] => ("P-384", true),
            [0x2b, 0x81, 0x04, 0x00, 0x23] => ("P-521", false),
            [0x2b, 0x81, 0x04, 0x00, 0x21] => ("P-224", false),
            [0x2b, 0x81, 0x04, 0x00, 0x0a] => ("secp256k1", false),
            _ => ("an unknown curve", false),
        };
        Self { name: format!("an ECDSA key on {name}"), is_supported }
    }
}

/// The name of a signature algorithm, from the contents of its `AlgorithmIdentifier`.
pub(crate) fn signature_name(algorithm: &[u8]) -> &'static str {
    match read_some(algorithm, |input| value(input, Tag::OID)).unwrap_or_default() {
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, last] => match last {
            0x02 => "RSA and MD2",
            0x04 => "RSA and MD5",
            0x05 => "RSA and SHA-1",
            0x0a => "RSA-PSS and unsupported parameters",
            0x0b..=0x0d => "RSA and SHA-2",
            0x0e => "RSA and SHA-224",
            _ => "RSA and an unknown digest",
        },
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01] => "ECDSA and SHA-1",
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, last] => match last {
            0x01 => "ECDSA and SHA-224",
            0x02 => "ECDSA and SHA-256",
            0x03 => "ECDSA and SHA-384",
            _ => "ECDSA and SHA-512",
        },
        [0x2a, 0x86, 0x48, 0xce, 0x38, 0x04, 0x03] => "DSA and SHA-1",
        [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x03, ..] => "DSA or a SHA-3 digest",
        ED25519 => "Ed25519",
        [0x2b, 0x65, 0x71] => "Ed448",
        _ => "an unknown algorithm",
    }
}

/// Reads `der` to its end.
fn read<'a, T>(
    der: &'a [u8],
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, Unspecified>,
) -> Result<T, Unspecified> {
    Input::from(der).read_all(Unspecified, read)
}

/// Reads the beginning of `der`.
fn read_some<'a, T>(
    der: &'a [u8],
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, Unspecified>,
) -> Result<T, Unspecified> {
    read(&mut Reader::new(Input::from(der)))
}

/// Reads items to the end of `der`.
fn items<'a, T>(
    der: &'a [u8],
    mut item: impl FnMut(&mut Reader<'a>) -> Result<T, Unspecified>,
) -> Result<Vec<T>, Unspecified> {
    read(der, |input| {
        let mut items = Vec::new();
        while !input.at_end() {
            items.push(item(input)?);
        }
        Ok(items)
    })
}

fn any<'a>(input: &mut Reader<'a>) -> Result<(u8, &'a [u8]), Unspecified> {
    der::read_tag_and_get_value(input).map(|(tag, value)| (tag, value.as_slice_less_safe()))
}

fn value<'a>(input: &mut Reader<'a>, tag: Tag) -> Result<&'a [u8], Unspecified> {
    der::expect_tag_and_get_value(input, tag).map(|value| value.as_slice_less_safe())
}

fn bit_string<'a>(input: &mut Reader<'a>) -> Result<&'a [u8], Unspecified> {
    der::bit_string_with_no_unused_bits(input).map(|bits| bits.as_slice_less_safe())
}

fn sequence<'a>(input: &mut Reader<'a>) -> Result<&'a [u8], Unspecified> {
    value(input, Tag::Sequence)
}

/// Reads a positive integer, without its leading zero byte.
fn integer<'a>(input: &mut Reader<'a>) -> Result<&'a [u8], Unspecified> {
    let bytes = value(input, Tag::Integer)?;
    Ok(bytes.strip_prefix(&[0]).unwrap_or(bytes))
}

#[cfg(test)]
#[cfg(feature = "loopback")]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, CustomExtension, DistinguishedName,
        DnType, DnValue, IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P384_SHA384, PKCS_ED25519,
        SigningKey,
    };

    use super::*;

    /// A certificate with these common names and DNS names.
    fn params(common_names: Vec<DnValue>, dns_names: &[&str]) -> CertificateParams {
        let mut params = CertificateParams::new(
            dns_names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>(),
        )
        .unwrap();
        params.distinguished_name = DistinguishedName::new();
        for (number, name) in common_names.into_iter().enumerate() {
            // rcgen allows one name of each type. The second one has a custom type with the same
            // OID.
            let kind = if number == 0 {
                DnType::CommonName
            } else {
                DnType::CustomDnType(vec![2, 5, 4, 3])
            };
            params.distinguished_name.push(kind, name);
        }
        params
    }

    fn self_signed(params: &CertificateParams) -> Vec<u8> {
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    fn text(name: &str) -> DnValue {
        DnValue::Utf8String(name.to_owned())
    }

    #[test]
    fn common_name_matches_in_exact_type_and_case_only() {
        let ours = "swarmctl";
        for (names, has) in [
            (vec![text(ours)], true),
            (vec![DnValue::PrintableString(ours.try_into().unwrap())], true),
            (vec![DnValue::Ia5String(ours.try_into().unwrap())], false),
            (vec![DnValue::TeletexString(ours.try_into().unwrap())], false),
            (vec![DnValue::BmpString(ours.try_into().unwrap())], false),
            (vec![DnValue::UniversalString(ours.try_into().unwrap())], false),
            (vec![text("Swarmctl")], false),
            (vec![text("swarmctl ")], false),
            (vec![text("swarmctl\0")], false),
            (vec![text("swarmctl\0.worker")], false),
            (vec![text("worker")], false),
            (vec![text(ours), text("worker")], false),
            (vec![text("worker"), text(ours)], false),
            (vec![text(ours), text(ours)], false),
            (vec![], false),
        ] {
            let der = self_signed(&params(names.clone(), &[ours]));
            assert_eq!(X509::parse(&der).unwrap().has_common_name(ours), has, "{names:?}");
        }
    }

    #[test]
    fn common_name_of_the_issuer_does_not_count() {
        let mut ca = params(vec![text("swarmctl")], &[]);
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
        let worker = params(vec![text("worker")], &[])
            .signed_by(&KeyPair::generate().unwrap(), &ca)
            .unwrap();
        let der = worker.der();
        assert!(!X509::parse(der).unwrap().has_common_name("swarmctl"));
        assert_eq!(X509::parse(der).unwrap().common_name().unwrap(), "worker");
    }

    #[test]
    fn dns_name_is_compared_byte_for_byte() {
        for (names, has) in [
            (&["swarmctl"][..], true),
            (&["localhost", "swarmctl"], true),
            (&["*"], false),
            (&["*.swarmctl"], false),
            (&["SWARMCTL"], false),
            (&["swarmctl."], false),
            (&["swarmctl.lan"], false),
            (&["127.0.0.1"], false),
            (&[], false),
        ] {
            let der = self_signed(&params(vec![text("swarmctl")], names));
            assert_eq!(X509::parse(&der).unwrap().has_dns_name("swarmctl"), has, "{names:?}");
        }
    }

    #[test]
    fn ca_needs_basic_constraints_and_key_usage() {
        let unconstrained = IsCa::Ca(BasicConstraints::Unconstrained);
        let sign = KeyUsagePurpose::KeyCertSign;
        let other = KeyUsagePurpose::DigitalSignature;
        for (is_ca, usages, problem) in [
            (unconstrained, vec![], None),
            (IsCa::Ca(BasicConstraints::Constrained(0)), vec![other, sign], None),
            (unconstrained, vec![other], Some("key usage does not allow issuing")),
            (IsCa::NoCa, vec![], Some("not marked as a CA")),
            (IsCa::NoCa, vec![sign], Some("not marked as a CA")),
            (IsCa::ExplicitNoCa, vec![sign], Some("not marked as a CA")),
        ] {
            let case = format!("{is_ca:?} {usages:?}");
            let mut params = params(vec![text("ca")], &[]);
            params.is_ca = is_ca;
            params.key_usages = usages;
            let der = self_signed(&params);
            let found = X509::parse(&der).unwrap().not_a_ca();
            assert_eq!(found.is_some(), problem.is_some(), "{case}: {found:?}");
            assert!(
                found.unwrap_or_default().contains(problem.unwrap_or_default()),
                "{case}: {found:?}"
            );
        }
    }

    #[test]
    fn invalid_basic_constraints_are_not_a_ca() {
        for content in [
            &b""[..],
            b"\x30\x03\x01\x01\x00",
            b"\x30\x03\x01\x01\x01",
            b"\x30\x03\x02\x01\xff",
            b"\x01\x01\xff",
        ] {
            let mut params = params(vec![text("ca")], &[]);
            params.custom_extensions =
                vec![CustomExtension::from_oid_content(&[2, 5, 29, 19], content.to_vec())];
            let der = self_signed(&params);
            assert!(X509::parse(&der).unwrap().not_a_ca().is_some(), "{content:?}");
        }
    }

    fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = u16::try_from(content.len()).unwrap().to_be_bytes();
        let length = match content.len() {
            0..=127 => vec![length[1]],
            128..=255 => vec![0x81, length[1]],
            _ => vec![0x82, length[0], length[1]],
        };
        [vec![tag], length, content.to_vec()].concat()
    }

    /// The same certificate as version 1, without extensions, signed by `key`.
    fn in_version_1(der: &[u8], key: &KeyPair) -> Vec<u8> {
        let signed = X509::parse(der).unwrap().signed;
        let fields = read(signed, sequence).unwrap();
        let fields = items(fields, |input| {
            Ok(input.read_partial(|input| any(input))?.0.as_slice_less_safe())
        })
        .unwrap();
        let signed = tlv(0x30, &fields[1..7].concat());
        let signature = tlv(0x03, &[vec![0], key.sign(&signed).unwrap()].concat());
        tlv(0x30, &[signed, fields[2].to_vec(), signature].concat())
    }

    #[test]
    fn self_signed_certificate_of_version_1_is_a_root() {
        let key = KeyPair::generate().unwrap();
        let other = KeyPair::generate().unwrap();
        let root = params(vec![text("old root")], &[]).self_signed(&key).unwrap();
        let forged = in_version_1(root.der(), &other);
        let root = in_version_1(root.der(), &key);
        assert_eq!(X509::parse(&root).unwrap().not_a_ca(), None);
        let mut roots = rustls::RootCertStore::empty();
        roots.add(root.into()).unwrap();
        let ca = CertifiedIssuer::self_signed(
            params(vec![text("ca")], &[]),
            KeyPair::generate().unwrap(),
        )
        .unwrap();
        let issued = params(vec![text("worker")], &[]).signed_by(&key, &ca).unwrap();
        let issued = in_version_1(issued.der(), ca.key());
        for der in [forged, issued] {
            let found = X509::parse(&der).unwrap().not_a_ca();
            assert_eq!(found, Some("a certificate of version 1 that is not self-signed"));
        }
    }

    #[test]
    fn keys_and_signatures_of_rcgen_are_supported() {
        for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let der = params(vec![text("ca")], &[]).self_signed(&key).unwrap().der().to_vec();
            let certificate = X509::parse(&der).unwrap();
            assert_eq!(
                (certificate.unsupported_key(), certificate.unsupported_signature()),
                (None, None)
            );
            assert_eq!(
                unsupported_private_key(&PrivateKeyDer::try_from(key.serialize_der()).unwrap()),
                None
            );
        }
    }

    #[test]
    fn truncated_certificate_is_not_parsed() {
        let der = self_signed(&params(vec![text("swarmctl")], &["swarmctl"]));
        for length in 0..der.len() {
            assert!(X509::parse(&der[..length]).is_none(), "{length}");
        }
        let trailed = [der.as_slice(), &[0]].concat();
        assert!(X509::parse(&trailed).is_none());
        assert_eq!(first_value(&trailed), Some(der.as_slice()));
    }
}
