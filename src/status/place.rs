//! Where DECNET's state file is: beside its Python package (`docs/protocol.md`, "The worker's host"). Runs on the thread that
//! asks; each search is a handful of `stat`s and one folder that is listed.
//!
//! DECNET writes the file when something is deployed and deletes it afterwards. So "there is no file" means "nothing is
//! deployed" only where the package is, or in a folder that the operator named. Elsewhere nothing is known. What cannot be
//! looked at (no permission, a loop of symlinks) is an error, and never "not found".
//!
//! The first place with the package counts, whether or not a state file is beside it: one beside a later package may have
//! been left behind.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::error::sanitize_path;
use crate::files;
use crate::limits;
use crate::text::sanitize;

/// The name of the state file.
const STATE_FILE: &str = "decnet-state.json";

/// The name of DECNET's Python package.
const PACKAGE: &str = "decnet";

/// Which state file is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StateFilePath {
    /// The one that somebody named.
    Named(PathBuf),
    /// The one that DECNET has on this host, which is looked for each time. The folder is `/`, or a test's.
    Searched { root: PathBuf },
}

/// Where the state file is, or would be if something were deployed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Located {
    pub(crate) file: PathBuf,
    /// `None`: it was named.
    pub(crate) package: Option<PathBuf>,
}

/// Why it is not known where the state file is, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NotLocated {
    /// DECNET's package is in none of its places, which are named.
    Absent(String),
    /// A place cannot be looked at.
    Unreadable(String),
}

impl fmt::Display for NotLocated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent(places) => {
                write!(
                    f,
                    "the state file was not found: DECNET's Python package is not in {places}"
                )
            }
            Self::Unreadable(problem) => {
                write!(f, "it is not known where the state file is: {problem}")
            }
        }
    }
}

impl fmt::Display for Located {
    /// How it was found, for a person.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.package {
            Some(package) => write!(f, "found beside {}", sanitize_path(package)),
            None => f.write_str("named"),
        }
    }
}

impl StateFilePath {
    /// Where DECNET has it on this host.
    pub(super) fn searched() -> Self {
        Self::Searched { root: PathBuf::from("/") }
    }

    /// Where the file is.
    pub(super) fn locate(&self) -> Result<Located, NotLocated> {
        match self {
            Self::Named(file) => Ok(Located { file: file.clone(), package: None }),
            Self::Searched { root } => search(root),
        }
    }
}

/// Whether a state file that is not there means that nothing is deployed. `Err` says why it does not.
pub(super) fn means_nothing_deployed(file: &Path) -> Result<(), String> {
    // A symlink to a file that is not there: its file system may not be mounted.
    if fs::symlink_metadata(file).is_ok_and(|found| found.is_symlink()) {
        return Err("is a symlink to a file that does not exist".to_owned());
    }
    let folder = match file.parent() {
        Some(folder) if folder == Path::new("") => Path::new("."),
        Some(folder) => folder,
        None => return Err("is not the name of a file".to_owned()),
    };
    match fs::metadata(folder) {
        Ok(_) => Ok(()),
        Err(error) => {
            Err(format!("its folder {} cannot be looked at: {error}", sanitize_path(folder)))
        }
    }
}

/// The first place that has the package. One that cannot be looked at ends the search: a later one might be wrong.
fn search(root: &Path) -> Result<Located, NotLocated> {
    let command = root.join("usr/local/bin/decnet");
    let (venv, editable) = (root.join("opt/decnet/venv"), root.join("opt/decnet"));
    let resolved = resolve(&command)?;
    let of_command = resolved.as_deref().and_then(Path::parent).and_then(Path::parent);
    let package = match of_command.map(package_of_environment).transpose()?.flatten() {
        Some(package) => Some(package),
        None => match package_of_environment(&venv)? {
            Some(package) => Some(package),
            None => package_in(&editable)?,
        },
    };
    if let Some(package) = package {
        let file = package.with_file_name(STATE_FILE);
        return Ok(Located { file, package: Some(package) });
    }
    let command = match of_command {
        Some(environment) => {
            format!("{} (of {})", sanitize_path(environment), sanitize_path(&command))
        }
        None if is_there(&command)? => {
            format!("{} (it leads to a file that does not exist)", sanitize_path(&command))
        }
        None => format!("{} (it does not exist)", sanitize_path(&command)),
    };
    let (venv, editable) = (sanitize_path(&venv), sanitize_path(&editable));
    Err(NotLocated::Absent(format!("{command}, {venv} or {editable}")))
}

/// Whether there is anything at that path, be it a symlink to nothing.
fn is_there(path: &Path) -> Result<bool, NotLocated> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(unknown(path, &error)),
    }
}

/// The file that a path leads to. `None`: there is none.
fn resolve(path: &Path) -> Result<Option<PathBuf>, NotLocated> {
    match fs::canonicalize(path) {
        Ok(resolved) => Ok(Some(resolved)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => match fs::read_link(path) {
            // The link itself could be read, so it is about what it leads to.
            Ok(target) if path.with_file_name(&target) != path => {
                let target = path.with_file_name(target);
                let (path, target) = (sanitize_path(path), sanitize_path(&target));
                Err(NotLocated::Unreadable(format!(
                    "{target}, to which {path} leads, cannot be looked at: {error}"
                )))
            }
            _ => Err(unknown(path, &error)),
        },
    }
}

/// The package in a virtual environment, or in a prefix such as `/usr/local`. An editable install has none there.
fn package_of_environment(environment: &Path) -> Result<Option<PathBuf>, NotLocated> {
    // In most environments `lib64` is a symlink to `lib`.
    for lib in ["lib", "lib64"] {
        let mut found = Vec::new();
        for version in python_versions(&environment.join(lib))? {
            for packages in ["site-packages", "dist-packages"] {
                let folder = environment.join(lib).join(version.folder()).join(packages);
                found.extend(package_in(&folder)?.map(|package| (version, package)));
            }
        }
        if found.len() > 1
            && let Some(own) = interpreter(environment)?
            && let Some(place) = found.iter().position(|(version, _)| *version == own)
        {
            return Ok(Some(found.swap_remove(place).1));
        }
        // Newest first.
        if let Some((_, package)) = found.into_iter().next() {
            return Ok(Some(package));
        }
    }
    Ok(None)
}

/// A Python 3 by its second number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u16);

impl Version {
    fn of_folder(name: &str) -> Option<Self> {
        let minor = name.strip_prefix("python3.")?;
        let version = Self(minor.parse().ok()?);
        // Not "python3.+11" or "python3.011".
        (version.folder() == name).then_some(version)
    }

    fn folder(self) -> String {
        format!("python3.{}", self.0)
    }
}

/// The versions of Python that a `lib` folder has packages for, the newest first.
fn python_versions(lib: &Path) -> Result<Vec<Version>, NotLocated> {
    let entries = match fs::read_dir(lib) {
        Ok(entries) => entries,
        Err(error) if is_absent(&error) => return Ok(Vec::new()),
        Err(error) => return Err(unknown(lib, &error)),
    };
    let mut versions = Vec::new();
    for (count, entry) in entries.enumerate() {
        if count == limits::LIB_ENTRIES {
            return Err(unknown(lib, &format!("it has more than {} entries", limits::LIB_ENTRIES)));
        }
        let name = entry.map_err(|error| unknown(lib, &error))?.file_name();
        versions.extend(name.to_str().and_then(Version::of_folder));
    }
    versions.sort_unstable_by(|one, other| other.cmp(one));
    versions.truncate(limits::PYTHON_VERSIONS);
    Ok(versions)
}

/// The version of the interpreter that a virtual environment was made for, as its `pyvenv.cfg` has it: `version = 3.11.2`,
/// or `version_info = 3.11.2.final.0`.
fn interpreter(environment: &Path) -> Result<Option<Version>, NotLocated> {
    let path = environment.join("pyvenv.cfg");
    let content = match files::read(&path, limits::PYVENV_CFG) {
        Ok(content) => content,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(unknown(&path, &error)),
    };
    let text = String::from_utf8_lossy(&content);
    let version = |line: &str| {
        let (key, value) = line.split_once('=')?;
        let mut numbers = value.trim().split('.');
        matches!(key.trim(), "version" | "version_info").then_some(())?;
        (numbers.next() == Some("3")).then_some(())?;
        numbers.next()?.parse().ok().map(Version)
    };
    Ok(text.lines().find_map(version))
}

/// The package in this folder, if it is there. A file of its name is not a package.
fn package_in(folder: &Path) -> Result<Option<PathBuf>, NotLocated> {
    let package = folder.join(PACKAGE);
    match fs::metadata(&package) {
        Ok(found) => Ok(found.is_dir().then_some(package)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(unknown(&package, &error)),
    }
}

/// There is nothing at that path: that is known. Of any other error it is not.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn unknown(path: &Path, problem: &impl fmt::Display) -> NotLocated {
    let (path, problem) = (sanitize_path(path), sanitize(&problem.to_string()));
    NotLocated::Unreadable(format!("{path} cannot be looked at: {problem}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const COMMAND: &str = "usr/local/bin/decnet";

    /// A worker's root folder, with folders (that end with a slash) and files.
    fn worker(paths: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for path in paths {
            add(dir.path(), path);
        }
        dir
    }

    fn add(root: &Path, path: &str) {
        let full = root.join(path);
        if path.ends_with('/') {
            fs::create_dir_all(&full).unwrap();
        } else {
            fs::create_dir_all(full.parent().unwrap()).unwrap();
            fs::write(&full, "").unwrap();
        }
    }

    /// `/usr/local/bin/decnet`, as the installer makes it.
    fn link_command(root: &Path, target: &str) {
        fs::create_dir_all(root.join("usr/local/bin")).unwrap();
        let _ = fs::remove_file(root.join(COMMAND));
        symlink(root.join(target), root.join(COMMAND)).unwrap();
    }

    /// Where the state file is, without the root, or the error.
    fn located(root: &Path) -> Result<String, String> {
        let root = fs::canonicalize(root).unwrap();
        let named = |path: &Path| path.strip_prefix(&root).unwrap().display().to_string();
        match search(&root) {
            Ok(Located { file, package, .. }) => {
                let package = package.unwrap();
                assert!(
                    package.is_dir()
                        && package.parent() == file.parent()
                        && package.ends_with("decnet")
                );
                Ok(named(&file))
            }
            Err(problem) => Err(problem.to_string().replace(&format!("{}/", root.display()), "/")),
        }
    }

    fn is_at(root: &Path, folder: &str) {
        assert_eq!(located(root), Ok(format!("{folder}/decnet-state.json")));
    }

    #[test]
    fn in_the_installers_virtual_environment_it_is_beside_the_package() {
        for version in ["python3.9", "python3.11", "python3.13", "python3.200"] {
            let package = format!("opt/decnet/venv/lib/{version}/site-packages/decnet/");
            let root = worker(&["opt/decnet/venv/bin/decnet", &package]);
            link_command(root.path(), "opt/decnet/venv/bin/decnet");
            is_at(root.path(), &format!("opt/decnet/venv/lib/{version}/site-packages"));
            // The agent's removal, or a broken install: the second place.
            fs::remove_file(root.path().join(COMMAND)).unwrap();
            is_at(root.path(), &format!("opt/decnet/venv/lib/{version}/site-packages"));
        }
    }

    #[test]
    fn the_command_leads_to_an_environment_anywhere() {
        let elsewhere = "srv/env/lib/python3.12/site-packages";
        let root =
            worker(&["srv/env/bin/decnet", &format!("{elsewhere}/decnet/"), "opt/decnet/decnet/"]);
        link_command(root.path(), "srv/env/bin/decnet");
        is_at(root.path(), elsewhere);
        // By way of another symlink.
        symlink(root.path().join("srv/env/bin/decnet"), root.path().join("srv/link")).unwrap();
        link_command(root.path(), "srv/link");
        is_at(root.path(), elsewhere);
        // No symlink: installed for the whole system.
        let root = worker(&[COMMAND, "usr/local/lib/python3.11/dist-packages/decnet/"]);
        is_at(root.path(), "usr/local/lib/python3.11/dist-packages");
    }

    #[test]
    fn an_editable_install_has_it_in_its_source() {
        let root = worker(&[
            "opt/decnet/venv/bin/decnet",
            "opt/decnet/venv/lib/python3.11/site-packages/decnet.pth",
        ]);
        link_command(root.path(), "opt/decnet/venv/bin/decnet");
        add(root.path(), "opt/decnet/decnet/");
        is_at(root.path(), "opt/decnet");
    }

    #[test]
    fn of_several_pythons_it_is_the_interpreters_own_or_the_newest_with_the_package() {
        let packages = |version: &str| format!("opt/decnet/venv/lib/{version}/site-packages");
        let with = |version: &str| format!("{}/decnet/", packages(version));
        let root = worker(&[
            &with("python3.9"),
            &with("python3.10"),
            &format!("{}/", packages("python3.12")),
        ]);
        is_at(root.path(), &packages("python3.10"));
        let config = root.path().join("opt/decnet/venv/pyvenv.cfg");
        for (content, version) in [
            ("home = /usr/bin\nversion = 3.9.2\n", "python3.9"),
            ("version_info=3.9.2.final.0", "python3.9"),
            ("version = 3.12.1\n", "python3.10"),
            ("version = 2.9\nversion\n=\n", "python3.10"),
            ("", "python3.10"),
        ] {
            fs::write(&config, content).unwrap();
            is_at(root.path(), &packages(version));
        }
        for name in [
            "python3.x",
            "python3.010",
            "python3.",
            "python3.+7",
            "python4.1",
            "python3.99999",
            "python3.13t",
        ] {
            add(root.path(), &with(name));
        }
        is_at(root.path(), &packages("python3.10"));
    }

    #[test]
    fn lib64_is_looked_into_where_lib_has_no_package() {
        let root = worker(&[
            "opt/decnet/venv/lib/python3.11/",
            "opt/decnet/venv/lib64/python3.11/site-packages/decnet/",
        ]);
        is_at(root.path(), "opt/decnet/venv/lib64/python3.11/site-packages");
    }

    #[test]
    fn nothing_found_says_where_it_was_looked_for() {
        let nothing = "the state file was not found: DECNET's Python package is not in ";
        let root = worker(&[]);
        let places = "/usr/local/bin/decnet (it does not exist), /opt/decnet/venv or /opt/decnet";
        assert_eq!(located(root.path()), Err(format!("{nothing}{places}")));
        // A stray state file is nobody's, and a file is not a package.
        let root = worker(&[
            "opt/decnet/decnet-state.json",
            "opt/decnet/venv/bin/decnet",
            "opt/decnet/decnet",
        ]);
        add(root.path(), "opt/decnet/venv/lib/python3.11/site-packages/decnet");
        link_command(root.path(), "opt/decnet/venv/bin/decnet");
        let places = "/opt/decnet/venv (of /usr/local/bin/decnet), /opt/decnet/venv or /opt/decnet";
        assert_eq!(located(root.path()), Err(format!("{nothing}{places}")));
        // A symlink to what was deleted.
        let root = worker(&["opt/decnet/decnet/"]);
        link_command(root.path(), "opt/decnet/venv/bin/decnet");
        is_at(root.path(), "opt/decnet");
    }

    #[test]
    fn the_first_package_counts_though_a_later_one_has_a_state_file() {
        let venv = "opt/decnet/venv/lib/python3.11/site-packages";
        let dir = worker(&[
            &format!("{venv}/decnet/"),
            "opt/decnet/decnet/",
            "opt/decnet/decnet-state.json",
        ]);
        is_at(dir.path(), venv);
    }

    #[test]
    fn a_command_that_leads_nowhere_is_not_said_to_be_missing() {
        let root = worker(&[]);
        link_command(root.path(), "opt/decnet/venv/bin/decnet");
        let places = "/usr/local/bin/decnet (it leads to a file that does not exist), /opt/decnet/venv or /opt/decnet";
        assert!(located(root.path()).unwrap_err().ends_with(places));
        // As where its folder may not be entered: the target is at fault, and not the link.
        let target = root.path().join("loop");
        symlink(&target, &target).unwrap();
        link_command(root.path(), "loop");
        let problem = located(root.path()).unwrap_err();
        let said = "/loop, to which /usr/local/bin/decnet leads, cannot be looked at: Too many levels of symbolic links";
        assert!(problem.contains(said), "{problem}");
    }

    #[test]
    fn what_cannot_be_looked_at_is_not_taken_for_not_found() {
        // Each has a package in the last place, which is not to be taken.
        for looped in
            [COMMAND, "opt/decnet/venv", "opt/decnet/venv/lib", "opt/decnet/venv/lib/python3.11"]
        {
            let root = worker(&["opt/decnet/decnet/"]);
            let path = root.path().join(looped);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(&path, &path).unwrap();
            let problem = located(root.path()).unwrap_err();
            assert!(
                problem.starts_with(&format!("it is not known where the state file is: /{looped}")),
                "{problem}"
            );
            assert!(
                problem.contains(" cannot be looked at: Too many levels of symbolic links"),
                "{problem}"
            );
        }
    }

    #[test]
    fn an_endless_folder_is_not_read_to_its_end() {
        let root = worker(&["opt/decnet/venv/lib/"]);
        for n in 0..=limits::LIB_ENTRIES {
            fs::write(root.path().join(format!("opt/decnet/venv/lib/{n}")), "").unwrap();
        }
        let problem = located(root.path()).unwrap_err();
        assert!(
            problem.ends_with(
                "/opt/decnet/venv/lib cannot be looked at: it has more than 4096 entries"
            ),
            "{problem}"
        );
    }

    #[test]
    fn a_fifo_in_its_way_is_not_opened() {
        let root = worker(&[]);
        for version in ["python3.11", "python3.12"] {
            add(root.path(), &format!("opt/decnet/venv/lib/{version}/site-packages/decnet/"));
        }
        let fifo = root.path().join("opt/decnet/venv/pyvenv.cfg");
        assert!(std::process::Command::new("mkfifo").arg(fifo).status().unwrap().success());
        assert!(
            located(root.path())
                .unwrap_err()
                .ends_with("pyvenv.cfg cannot be looked at: not a regular file")
        );
    }

    #[test]
    fn a_named_file_that_is_missing_means_nothing_deployed_only_in_a_folder_that_is_there() {
        let root = worker(&["state/", "file"]);
        let problem = |path: &str| means_nothing_deployed(&root.path().join(path)).unwrap_err();
        means_nothing_deployed(&root.path().join("state/none.json")).unwrap();
        means_nothing_deployed(Path::new("no-such-file.json")).unwrap();
        means_nothing_deployed(Path::new("")).unwrap_err();
        assert!(
            problem("none/none.json")
                .ends_with("none cannot be looked at: No such file or directory (os error 2)")
        );
        symlink(root.path().join("none/x.json"), root.path().join("state/link.json")).unwrap();
        assert_eq!(problem("state/link.json"), "is a symlink to a file that does not exist");
    }
}
