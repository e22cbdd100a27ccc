//! The bundle, a file a step. Runs on the program's main thread.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::SystemTime;

use rustls::crypto::CryptoProvider;

use super::certificate::Described;
use super::steps::{Checklist, Step};
use crate::bundle::{self, Bundle, CA, CERTIFICATE, ENROL, KEY};
use crate::error::{Error, chain, printable_path};
use crate::verifier;

/// A CA that ends is not renewed by an enrolment.
const RENEW_CA: &str = "renew the master's CA, and then enrol this host again";

/// The bundle, if it can be used.
pub(super) fn check(dir: &Path, list: &mut Checklist) -> Option<Bundle> {
    let provider = verifier::provider();
    let loaded = Bundle::load(dir, &provider);
    let error = loaded.as_ref().err();
    for name in [CA, CERTIFICATE] {
        let step = match (of_file(error, &dir.join(name)), &loaded) {
            (Some(error), _) => broken(name, error),
            (None, Ok(bundle)) => advised(certificate(name, dir, &provider), bundle, &provider),
            (None, Err(_)) => certificate(name, dir, &provider),
        };
        list.add(step);
    }
    list.add(match error {
        None => key(dir),
        Some(error) if of_file(Some(error), &dir.join(KEY)).is_some() => broken(KEY, error),
        // Of the folder: each of the two is good, and they do not fit.
        Some(error) if of_file(Some(error), dir).is_some() => broken(KEY, error),
        Some(_) => Step::not_tried(KEY, "it takes the files above"),
    });
    loaded.ok()
}

/// What a good bundle's certificates leave to be said.
fn advised(step: Step, bundle: &Bundle, provider: &CryptoProvider) -> Step {
    match step.name() {
        // It has an advice of its own.
        _ if !step.is_good() => step,
        CA => match bundle.ignored.as_slice() {
            [] => step,
            ignored => step.advise(format!("remove from it what is ignored: {}", ignored.join(", "))),
        },
        _ => match bundle.weak_signature(provider) {
            Some(problem) => step.advise(format!("the master may refuse it: {problem}")),
            None if bundle.is_of_its_ca(provider) => step,
            None => step.advise(format!("it was not issued by ca.crt: {ENROL}")),
        },
    }
}

fn of_file<'a>(error: Option<&'a Error>, path: &Path) -> Option<&'a Error> {
    error.filter(|error| error.path() == Some(path))
}

fn broken(name: &'static str, error: &Error) -> Step {
    let (says, remedy) = error.bundle_parts().unwrap_or_else(|| (chain(error), ENROL));
    let file = error.path().map(printable_path).unwrap_or_default();
    Step::unconfigured(name, format!("{file}: {says}"), remedy)
}

/// What it says, and whether it is valid now.
fn certificate(name: &'static str, dir: &Path, provider: &CryptoProvider) -> Step {
    let now = SystemTime::now();
    let described = match first(name, &dir.join(name), provider) {
        Ok(described) => described,
        Err(problem) => return Step::good(name, format!("what it says cannot be shown: {problem}")),
    };
    let Described { subject, issuer, fingerprint, .. } = &described;
    let says = match name {
        CA => format!("{subject}, {}", described.validity(now)),
        _ => format!("{subject}, issued by {issuer}, {}, sha256 {fingerprint}", described.validity(now)),
    };
    let renew = if name == CA { RENEW_CA } else { ENROL };
    let step = match (described.is_valid(now), described.ends_soon(now)) {
        (false, _) => Step::bad(name, says, format!("see to this host's clock, or {renew}")),
        (true, true) => Step::good(name, says).advise(format!("in time, {renew}")),
        (true, false) => Step::good(name, says),
    };
    described.facts(step, now).fact("file", printable_path(&dir.join(name)))
}

/// Our own certificate, or the master's CA.
fn first(name: &str, path: &Path, provider: &CryptoProvider) -> Result<Described, String> {
    let content = bundle::read(path).map_err(|error| chain(&error))?;
    let certificates = bundle::certificates(path, &content).map_err(|error| chain(&error))?;
    let shown = if name == CA { bundle::first_root(&certificates, provider) } else { certificates.into_iter().next() };
    Described::of(&shown.ok_or("it holds no certificate")?)
}

/// It fits. Who else may read it?
fn key(dir: &Path) -> Step {
    let path = dir.join(KEY);
    let mode = fs::metadata(&path).map_or(0, |found| found.permissions().mode() & 0o7777);
    let file = printable_path(&path);
    let step = Step::good(KEY, format!("fits worker.crt, mode {mode:04o}")).fact("mode", format!("{mode:04o}"));
    let step = step.fact("file", file.as_str());
    if mode & 0o077 == 0 { step } else { step.advise(format!("others can read it: chmod 600 {file}")) }
}
