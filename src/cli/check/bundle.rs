//! The bundle, a file a step. Runs on the program's main thread.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::SystemTime;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::certificate::Described;
use super::steps::{Checklist, Step};
use crate::bundle::{Bundle, CA, CERTIFICATE, KEY};
use crate::error::{Error, chain, printable_path};
use crate::{files, limits, verifier};

/// Why nothing more can be done with a bundle that cannot be used.
const AGAIN: &str = "enrol this host again from its master, which writes all three files";

/// The bundle, if it can be used.
pub(super) fn check(dir: &Path, list: &mut Checklist) -> Option<Bundle> {
    let provider = verifier::provider();
    let loaded = Bundle::load(dir, &provider);
    let error = loaded.as_ref().err();
    for name in [CA, CERTIFICATE] {
        let step = of_file(error, &dir.join(name)).map_or_else(|| certificate(name, dir), |error| broken(name, error));
        let stranger = name == CERTIFICATE && loaded.as_ref().is_ok_and(|bundle| !bundle.is_of_its_ca(&provider));
        list.add(if stranger { step.advise(format!("it was not issued by ca.crt: {AGAIN}")) } else { step });
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

fn of_file<'a>(error: Option<&'a Error>, path: &Path) -> Option<&'a Error> {
    error.filter(|error| error.path() == Some(path))
}

fn broken(name: &'static str, error: &Error) -> Step {
    Step::unconfigured(name, chain(error), AGAIN)
}

/// What it says, and whether it is valid now.
fn certificate(name: &'static str, dir: &Path) -> Step {
    let now = SystemTime::now();
    let described = match first(&dir.join(name)) {
        Ok(described) => described,
        Err(problem) => return Step::good(name, format!("what it says cannot be shown: {problem}")),
    };
    let Described { subject, issuer, fingerprint, .. } = &described;
    let says = match name {
        CA => format!("{subject}, {}", described.validity(now)),
        _ => format!("{subject}, issued by {issuer}, {}, sha256 {fingerprint}", described.validity(now)),
    };
    let step = match (described.is_valid(now), described.ends_soon(now)) {
        (false, _) => Step::bad(name, says, format!("see to this host's clock, or {AGAIN}")),
        (true, true) => Step::good(name, says).advise(format!("in time, {AGAIN}")),
        (true, false) => Step::good(name, says),
    };
    described.facts(step, now).fact("file", printable_path(&dir.join(name)))
}

fn first(path: &Path) -> Result<Described, String> {
    let content = files::read(path, limits::PEM_FILE).map_err(|error| error.to_string())?;
    let certificate = CertificateDer::from_pem_slice(&content).map_err(|_| "it is not PEM".to_owned())?;
    Described::of(&certificate)
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
