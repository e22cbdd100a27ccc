//! The bundle, a file a step. Runs on the program's main thread.

use std::cmp::Reverse;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;

use super::certificate::Described;
use super::steps::{Checklist, Step};
use crate::credentials::bundle::{self, Bundle, BundleCheck, CA, CERTIFICATE, ENROL, KEY};
use crate::error::{Error, chain, sanitize_path};
use crate::master::verifier;

/// A CA that ends is not renewed by an enrolment.
const RENEW_CA: &str = "renew the master's CA, and then enrol this host again";

/// The bundle, if it can be used.
pub(super) fn check(dir: &Path, list: &mut Checklist) -> Option<Bundle> {
    let provider = verifier::provider();
    let (bundle, judged) = match Bundle::load(dir, &provider) {
        Ok(bundle) => {
            (Some(bundle), BundleCheck { ca: Ok(()), certificate: Ok(()), key: Some(Ok(())) })
        }
        Err(error) => (None, BundleCheck::of(dir, &provider, error)),
    };
    let roots = Roots::of(dir, &provider);
    list.add(
        judged.ca.map_or_else(|error| broken(CA, &error), |()| ca(dir, &roots, bundle.as_ref())),
    );
    let own = || own(dir, &roots, bundle.as_ref(), &provider);
    list.add(judged.certificate.map_or_else(|error| broken(CERTIFICATE, &error), |()| own()));
    list.add(match judged.key {
        Some(Ok(())) => key(dir),
        Some(Err(error)) => broken(KEY, &error),
        None => Step::not_tried(KEY, "it takes worker.crt"),
    });
    bundle
}

fn broken(name: &'static str, error: &Error) -> Step {
    let (says, remedy) = error.bundle_parts().unwrap_or_else(|| (chain(error), ENROL));
    let file = error.path().map(sanitize_path).unwrap_or_default();
    Step::refused(name, error, format!("{file}: {says}"), remedy)
}

/// The roots of `ca.crt`.
struct Roots {
    /// The valid ones, and of those first the one that ends last.
    valid: Vec<(Described, CertificateDer<'static>)>,
    others: Vec<Described>,
    now: SystemTime,
}

impl Roots {
    fn of(dir: &Path, provider: &CryptoProvider) -> Self {
        let now = SystemTime::now();
        let mut roots = certificates(&dir.join(CA)).unwrap_or_default();
        roots.retain(|der| bundle::is_root(der, provider));
        let described = roots.into_iter().filter_map(|der| Some((Described::of(&der).ok()?, der)));
        let (mut valid, others): (Vec<_>, Vec<_>) =
            described.partition(|(described, _)| described.is_valid(now));
        valid.sort_by_key(|(described, _)| Reverse(described.expires));
        Self { valid, others: others.into_iter().map(|(described, _)| described).collect(), now }
    }

    /// What our certificate must be of.
    fn valid(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.valid.iter().map(|(_, der)| der.clone()));
        roots
    }
}

/// The master's CA. While it is being replaced there are two.
fn ca(dir: &Path, roots: &Roots, bundle: Option<&Bundle>) -> Step {
    let now = roots.now;
    let says = |root: &Described| format!("{}, {}", root.subject, root.validity(now));
    let (step, root) = match (roots.valid.first(), roots.others.first()) {
        (Some((root, _)), _) => (Step::good(CA, says(root)), root),
        (None, Some(root)) => {
            (Step::bad(CA, says(root), format!("see to this host's clock, or {RENEW_CA}")), root)
        }
        (None, None) => return Step::good(CA, "what it says cannot be shown"),
    };
    let step = root.facts(step, now).fact("file", sanitize_path(&dir.join(CA)));
    let mut advice = Vec::new();
    if root.ends_soon(now) {
        advice.push(format!("in time, {RENEW_CA}"));
    }
    if !roots.others.is_empty() {
        let others: Vec<_> = roots.others.iter().map(says).collect();
        advice.push(format!("remove from it what is not valid: {}", others.join(", ")));
    }
    if let Some(ignored) =
        bundle.map(|bundle| bundle.ignored.join(", ")).filter(|ignored| !ignored.is_empty())
    {
        advice.push(format!("remove from it what is ignored: {ignored}"));
    }
    // A step that is not good has an advice of its own.
    if advice.is_empty() || !step.is_good() { step } else { step.advise(advice.join("; ")) }
}

/// Our certificate: what it says, whether it is valid now, and what a good bundle leaves to be said.
fn own(dir: &Path, roots: &Roots, bundle: Option<&Bundle>, provider: &CryptoProvider) -> Step {
    let (path, now) = (dir.join(CERTIFICATE), roots.now);
    let own = certificates(&path)
        .and_then(|all| Described::of(all.first().ok_or("it holds no certificate")?));
    let own = match own {
        Ok(own) => own,
        Err(problem) => {
            return Step::good(CERTIFICATE, format!("what it says cannot be shown: {problem}"));
        }
    };
    let Described { subject, issuer, fingerprint, .. } = &own;
    let says =
        format!("{subject}, issued by {issuer}, {}, sha256 {fingerprint}", own.validity(now));
    let step = match (own.is_valid(now), own.ends_soon(now)) {
        (false, _) => Step::bad(CERTIFICATE, says, format!("see to this host's clock, or {ENROL}")),
        (true, true) => Step::good(CERTIFICATE, says).advise(format!("in time, {ENROL}")),
        (true, false) => Step::good(CERTIFICATE, says),
    };
    let step = own.facts(step, now).fact("file", sanitize_path(&path));
    let Some(bundle) = bundle.filter(|_| step.is_good()) else { return step };
    match bundle.weak_signature(provider) {
        Some(problem) => step.advise(format!("the master may refuse it: {problem}")),
        None if !bundle.is_issued_by_its_ca(provider) => {
            step.advise(format!("it was not issued by ca.crt: {ENROL}"))
        }
        None if !roots.valid.is_empty() && !bundle.is_issued_by(&roots.valid(), provider) => step
            .advise(format!(
                "the master may refuse it, as the CA that issued it is not valid: {ENROL}"
            )),
        None => step,
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let content = bundle::read(path).map_err(|error| chain(&error))?;
    bundle::certificates(path, &content).map_err(|error| chain(&error))
}

/// It fits. Who else may read it?
fn key(dir: &Path) -> Step {
    let path = dir.join(KEY);
    let mode = fs::metadata(&path).map_or(0, |found| found.permissions().mode() & 0o7777);
    let file = sanitize_path(&path);
    let step = Step::good(KEY, format!("fits worker.crt, mode {mode:04o}"))
        .fact("mode", format!("{mode:04o}"));
    let step = step.fact("file", file.as_str());
    if mode & 0o077 == 0 {
        step
    } else {
        step.advise(format!("others can read it: chmod 600 {file}"))
    }
}
