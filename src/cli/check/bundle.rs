//! Checks the bundle, one step for each file. Runs on the main thread.

use std::cmp::Reverse;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;

use super::certificate::CertificateInfo;
use super::steps::{Checklist, Step};
use crate::credentials::bundle::{self, Bundle, BundleCheck, CA, CERTIFICATE, ENROL, KEY};
use crate::error::{Error, chain, sanitize_path};

/// An enrolment does not renew the CA.
const RENEW_CA: &str = "renew the master's CA, then enrol this host again";

/// Adds the steps, and returns the bundle if it is valid.
pub(super) fn check(dir: &Path, list: &mut Checklist) -> Option<Bundle> {
    let (bundle, judged) = match Bundle::load(dir) {
        Ok(bundle) => {
            (Some(bundle), BundleCheck { ca: Ok(()), certificate: Ok(()), key: Some(Ok(())) })
        }
        Err(error) => (None, BundleCheck::of(dir, error)),
    };
    let roots = Roots::of(dir);
    list.add(
        judged.ca.map_or_else(|error| invalid(CA, &error), |()| ca(dir, &roots, bundle.as_ref())),
    );
    let own = || own_certificate(dir, &roots, bundle.as_ref());
    list.add(judged.certificate.map_or_else(|error| invalid(CERTIFICATE, &error), |()| own()));
    list.add(match judged.key {
        Some(Ok(())) => key(dir),
        Some(Err(error)) => invalid(KEY, &error),
        None => Step::not_tried(KEY, "needs worker.crt"),
    });
    bundle
}

fn invalid(name: &'static str, error: &Error) -> Step {
    let (problem, remedy) = error.bundle_parts().unwrap_or_else(|| (chain(error), ENROL));
    let file = error.path().map(sanitize_path).unwrap_or_default();
    Step::refused(name, error, format!("{file}: {problem}"), remedy)
}

/// The roots of `ca.crt`.
struct Roots {
    /// The valid roots, the one that expires last first.
    valid: Vec<(CertificateInfo, CertificateDer<'static>)>,
    invalid: Vec<CertificateInfo>,
    now: SystemTime,
}

impl Roots {
    fn of(dir: &Path) -> Self {
        let now = SystemTime::now();
        let mut roots = bundle::certificates(&dir.join(CA)).unwrap_or_default();
        roots.retain(bundle::is_root);
        let described =
            roots.into_iter().filter_map(|der| Some((CertificateInfo::of(&der).ok()?, der)));
        let (mut valid, invalid): (Vec<_>, Vec<_>) =
            described.partition(|(described, _)| described.is_valid(now));
        valid.sort_by_key(|(described, _)| Reverse(described.expires));
        Self { valid, invalid: invalid.into_iter().map(|(described, _)| described).collect(), now }
    }

    /// The valid roots, to verify our certificate with.
    fn valid(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.valid.iter().map(|(_, der)| der.clone()));
        roots
    }
}

/// The step of the master's CA. While it is being replaced, there are two roots.
fn ca(dir: &Path, roots: &Roots, bundle: Option<&Bundle>) -> Step {
    let now = roots.now;
    let describe = |root: &CertificateInfo| format!("{}, {}", root.subject, root.validity(now));
    let (step, root) = match (roots.valid.first(), roots.invalid.first()) {
        (Some((root, _)), _) => (Step::good(CA, describe(root)), root),
        (None, Some(root)) => {
            (Step::bad(CA, describe(root), format!("check this host's clock, or {RENEW_CA}")), root)
        }
        (None, None) => return Step::good(CA, "its contents cannot be shown"),
    };
    let step = root.facts(step, now).fact("file", sanitize_path(&dir.join(CA)));
    let mut advice = Vec::new();
    if root.expires_soon(now) {
        advice.push(format!("before it expires, {RENEW_CA}"));
    }
    if !roots.invalid.is_empty() {
        let invalid: Vec<_> = roots.invalid.iter().map(describe).collect();
        advice.push(format!("remove the invalid certificates from it: {}", invalid.join(", ")));
    }
    if let Some(ignored) =
        bundle.map(|bundle| bundle.ignored.join(", ")).filter(|ignored| !ignored.is_empty())
    {
        advice.push(format!("remove the ignored entries from it: {ignored}"));
    }
    // A failed step has advice already.
    if advice.is_empty() || !step.is_good() { step } else { step.advise(advice.join("; ")) }
}

/// The step of our certificate: what it contains, whether it is valid now, and whether the master
/// may reject it all the same.
fn own_certificate(dir: &Path, roots: &Roots, bundle: Option<&Bundle>) -> Step {
    let path = dir.join(CERTIFICATE);
    let now = roots.now;
    let own = bundle::certificates(&path)
        .map_err(|error| chain(&error))
        .and_then(|all| CertificateInfo::of(all.first().ok_or("it contains no certificate")?));
    let own = match own {
        Ok(own) => own,
        Err(problem) => {
            return Step::good(CERTIFICATE, format!("its contents cannot be shown: {problem}"));
        }
    };
    let CertificateInfo { subject, issuer, fingerprint, .. } = &own;
    let message =
        format!("{subject}, issued by {issuer}, {}, sha256 {fingerprint}", own.validity(now));
    let step = match (own.is_valid(now), own.expires_soon(now)) {
        (false, _) => {
            Step::bad(CERTIFICATE, message, format!("check this host's clock, or {ENROL}"))
        }
        (true, true) => {
            Step::good(CERTIFICATE, message).advise(format!("before it expires, {ENROL}"))
        }
        (true, false) => Step::good(CERTIFICATE, message),
    };
    let step = own.facts(step, now).fact("file", sanitize_path(&path));
    let Some(bundle) = bundle.filter(|_| step.is_good()) else { return step };
    match bundle.weak_signature() {
        Some(problem) => step.advise(format!("the master may reject it: {problem}")),
        None if !bundle.is_issued_by(&bundle.roots) => {
            step.advise(format!("it was not issued by ca.crt: {ENROL}"))
        }
        None if !roots.valid.is_empty() && !bundle.is_issued_by(&roots.valid()) => {
            step.advise(format!(
                "the master may reject it, because the CA that issued it is not valid: {ENROL}"
            ))
        }
        None => step,
    }
}

/// The step of a key that fits: whether other users can read it.
fn key(dir: &Path) -> Step {
    let path = dir.join(KEY);
    let mode = fs::metadata(&path).map_or(0, |metadata| metadata.permissions().mode() & 0o7777);
    let file = sanitize_path(&path);
    let step = Step::good(KEY, format!("matches worker.crt, mode {mode:04o}"))
        .fact("mode", format!("{mode:04o}"));
    let step = step.fact("file", file.as_str());
    if mode & 0o077 == 0 {
        step
    } else {
        step.advise(format!("other users can read it: chmod 600 {file}"))
    }
}
