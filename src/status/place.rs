//! Locates DECNET's state file, which is in the same folder as its Python package. Runs on the
//! calling thread. A search costs a few `stat`s and one listed folder.
//!
//! DECNET writes the file when something is deployed, and deletes it afterwards. A missing file
//! means that nothing is deployed only if the package is there, or if the operator named the
//! folder. Otherwise it is unknown what is deployed. A place that cannot be accessed (no
//! permission, a loop of symlinks) is an error, and not "not found".
//!
//! The first place with the package counts, even if it has no state file: a state file in a later
//! place may be stale.

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

/// How the state file is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StateFilePath {
    /// At this path, which the operator set.
    Named(PathBuf),
    /// By a search for DECNET's package, each time. `root` is `/`, except in tests.
    Searched { root: PathBuf },
}

/// The path of the state file. The file may not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateFileLocation {
    pub(crate) file: PathBuf,
    /// `None`: the path was set by the operator.
    pub(crate) package: Option<PathBuf>,
}

/// Why the path of the state file is unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LocateError {
    /// DECNET's package is in none of these places.
    Absent(String),
    /// A place cannot be accessed.
    Unreadable(String),
}

impl fmt::Display for LocateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent(places) => {
                write!(
                    f,
                    "the state file was not found: DECNET's Python package is not in {places}"
                )
            }
            Self::Unreadable(problem) => {
                write!(f, "cannot locate the state file: {problem}")
            }
        }
    }
}

impl fmt::Display for StateFileLocation {
    /// How the file was found.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.package {
            Some(package) => write!(f, "found beside {}", sanitize_path(package)),
            None => f.write_str("named"),
        }
    }
}

impl StateFilePath {
    /// Finds the path of the file.
    pub(super) fn locate(&self) -> Result<StateFileLocation, LocateError> {
        match self {
            Self::Named(file) => Ok(StateFileLocation { file: file.clone(), package: None }),
            Self::Searched { root } => search(root),
        }
    }
}

/// Checks that a missing state file means that nothing is deployed. The error is the reason why it
/// does not.
pub(super) fn means_nothing_deployed(file: &Path) -> Result<(), String> {
    // The file system of a dangling symlink's target may not be mounted.
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
            Err(format!("its folder {} cannot be accessed: {error}", sanitize_path(folder)))
        }
    }
}

/// Finds the first place with the package. A place that cannot be accessed ends the search, as a
/// later one may be wrong.
fn search(root: &Path) -> Result<StateFileLocation, LocateError> {
    let command = root.join("usr/local/bin/decnet");
    let venv = root.join("opt/decnet/venv");
    let editable = root.join("opt/decnet");
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
        return Ok(StateFileLocation { file, package: Some(package) });
    }
    let command = match of_command {
        Some(environment) => {
            format!("{} (of {})", sanitize_path(environment), sanitize_path(&command))
        }
        None if command.is_symlink() => {
            format!("{} (it leads to a file that does not exist)", sanitize_path(&command))
        }
        None => format!("{} (it does not exist)", sanitize_path(&command)),
    };
    let venv = sanitize_path(&venv);
    let editable = sanitize_path(&editable);
    Err(LocateError::Absent(format!("{command}, {venv} or {editable}")))
}

/// Resolves all symlinks of `path`. `None`: the target does not exist.
fn resolve(path: &Path) -> Result<Option<PathBuf>, LocateError> {
    match fs::canonicalize(path) {
        Ok(resolved) => Ok(Some(resolved)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => match fs::read_link(path) {
            // The link itself could be read, so the error is about its target.
            Ok(target) if path.with_file_name(&target) != path => {
                let target = path.with_file_name(target);
                let path = sanitize_path(path);
                let target = sanitize_path(&target);
                Err(LocateError::Unreadable(format!(
                    "{target}, the target of {path}, cannot be accessed: {error}"
                )))
            }
            _ => Err(unknown(path, &error)),
        },
    }
}

/// The package in a virtual environment, or in a prefix such as `/usr/local`. An editable install
/// has no package there.
fn package_of_environment(environment: &Path) -> Result<Option<PathBuf>, LocateError> {
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

/// A version of Python 3, by its minor number.
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

/// The versions of Python with a folder in `lib`, newest first.
fn python_versions(lib: &Path) -> Result<Vec<Version>, LocateError> {
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

/// The version of the interpreter of a virtual environment, from its `pyvenv.cfg`: `version =
/// 3.11.2`, or `version_info = 3.11.2.final.0`.
fn interpreter(environment: &Path) -> Result<Option<Version>, LocateError> {
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

/// The package in `folder`. A file with its name is not a package.
fn package_in(folder: &Path) -> Result<Option<PathBuf>, LocateError> {
    let package = folder.join(PACKAGE);
    match fs::metadata(&package) {
        Ok(found) => Ok(found.is_dir().then_some(package)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(unknown(&package, &error)),
    }
}

/// Whether the error means that the path does not exist. Other errors leave it unknown.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn unknown(path: &Path, problem: &impl fmt::Display) -> LocateError {
    let path = sanitize_path(path);
    let problem = sanitize(&problem.to_string());
    LocateError::Unreadable(format!("{path} cannot be accessed: {problem}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const COMMAND: &str = "usr/local/bin/decnet";

    /// The root folder of a worker with these folders, which end with a slash, and files.
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

    /// Creates `/usr/local/bin/decnet` as the installer does.
    fn link_command(root: &Path, target: &str) {
        fs::create_dir_all(root.join("usr/local/bin")).unwrap();
        let _ = fs::remove_file(root.join(COMMAND));
        symlink(root.join(target), root.join(COMMAND)).unwrap();
    }

    /// The path of the state file without the root, or the error.
    fn located(root: &Path) -> Result<String, String> {
        let root = fs::canonicalize(root).unwrap();
        let named = |path: &Path| path.strip_prefix(&root).unwrap().display().to_string();
        match search(&root) {
            Ok(StateFileLocation { file, package, .. }) => {
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
    fn package_is_found_in_the_installers_virtual_environment() {
        for version in ["python3.9", "python3.11", "python3.13", "python3.200"] {
            let package = format!("opt/decnet/venv/lib/{version}/site-packages/decnet/");
            let root = worker(&["opt/decnet/venv/bin/decnet", &package]);
            link_command(root.path(), "opt/decnet/venv/bin/decnet");
            is_at(root.path(), &format!("opt/decnet/venv/lib/{version}/site-packages"));
            // After the removal of the agent, or with a broken install, the second place counts.
            fs::remove_file(root.path().join(COMMAND)).unwrap();
            is_at(root.path(), &format!("opt/decnet/venv/lib/{version}/site-packages"));
        }
    }

    #[test]
    fn command_may_lead_to_any_environment() {
        let elsewhere = "srv/env/lib/python3.12/site-packages";
        let root =
            worker(&["srv/env/bin/decnet", &format!("{elsewhere}/decnet/"), "opt/decnet/decnet/"]);
        link_command(root.path(), "srv/env/bin/decnet");
        is_at(root.path(), elsewhere);
        // Through another symlink.
        symlink(root.path().join("srv/env/bin/decnet"), root.path().join("srv/link")).unwrap();
        link_command(root.path(), "srv/link");
        is_at(root.path(), elsewhere);
        // Not a symlink: a system-wide install.
        let root = worker(&[COMMAND, "usr/local/lib/python3.11/dist-packages/decnet/"]);
        is_at(root.path(), "usr/local/lib/python3.11/dist-packages");
    }

    #[test]
    fn package_of_an_editable_install_is_in_its_source() {
        let root = worker(&[
            "opt/decnet/venv/bin/decnet",
            "opt/decnet/venv/lib/python3.11/site-packages/decnet.pth",
        ]);
        link_command(root.path(), "opt/decnet/venv/bin/decnet");
        add(root.path(), "opt/decnet/decnet/");
        is_at(root.path(), "opt/decnet");
    }

    #[test]
    fn interpreters_version_or_the_newest_with_the_package_counts() {
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
    fn lib64_is_searched_if_lib_has_no_package() {
        let root = worker(&[
            "opt/decnet/venv/lib/python3.11/",
            "opt/decnet/venv/lib64/python3.11/site-packages/decnet/",
        ]);
        is_at(root.path(), "opt/decnet/venv/lib64/python3.11/site-packages");
    }

    #[test]
    fn not_found_error_names_the_searched_places() {
        let nothing = "the state file was not found: DECNET's Python package is not in ";
        let root = worker(&[]);
        let places = "/usr/local/bin/decnet (it does not exist), /opt/decnet/venv or /opt/decnet";
        assert_eq!(located(root.path()), Err(format!("{nothing}{places}")));
        // A state file without a package does not count, and a file is not a package.
        let root = worker(&[
            "opt/decnet/decnet-state.json",
            "opt/decnet/venv/bin/decnet",
            "opt/decnet/decnet",
        ]);
        add(root.path(), "opt/decnet/venv/lib/python3.11/site-packages/decnet");
        link_command(root.path(), "opt/decnet/venv/bin/decnet");
        let places = "/opt/decnet/venv (of /usr/local/bin/decnet), /opt/decnet/venv or /opt/decnet";
        assert_eq!(located(root.path()), Err(format!("{nothing}{places}")));
        // A dangling symlink.
        let root = worker(&["opt/decnet/decnet/"]);
        link_command(root.path(), "opt/decnet/venv/bin/decnet");
        is_at(root.path(), "opt/decnet");
    }

    #[test]
    fn first_package_counts_even_if_a_later_one_has_a_state_file() {
        let venv = "opt/decnet/venv/lib/python3.11/site-packages";
        let dir = worker(&[
            &format!("{venv}/decnet/"),
            "opt/decnet/decnet/",
            "opt/decnet/decnet-state.json",
        ]);
        is_at(dir.path(), venv);
    }

    #[test]
    fn dangling_command_is_not_reported_as_missing() {
        let root = worker(&[]);
        link_command(root.path(), "opt/decnet/venv/bin/decnet");
        let places = "/usr/local/bin/decnet (it leads to a file that does not exist), /opt/decnet/venv or /opt/decnet";
        assert!(located(root.path()).unwrap_err().ends_with(places));
        // The error names the target, not the link.
        let target = root.path().join("loop");
        symlink(&target, &target).unwrap();
        link_command(root.path(), "loop");
        let problem = located(root.path()).unwrap_err();
        let expected = "/loop, the target of /usr/local/bin/decnet, cannot be accessed: Too many levels of symbolic links";
        assert!(problem.contains(expected), "{problem}");
    }

    #[test]
    fn inaccessible_place_is_not_treated_as_not_found() {
        // The last place has a package, which must not be used.
        for looped in
            [COMMAND, "opt/decnet/venv", "opt/decnet/venv/lib", "opt/decnet/venv/lib/python3.11"]
        {
            let root = worker(&["opt/decnet/decnet/"]);
            let path = root.path().join(looped);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(&path, &path).unwrap();
            let problem = located(root.path()).unwrap_err();
            assert!(
                problem.starts_with(&format!("cannot locate the state file: /{looped}")),
                "{problem}"
            );
            assert!(
                problem.contains(" cannot be accessed: Too many levels of symbolic links"),
                "{problem}"
            );
        }
    }

    #[test]
    fn number_of_folder_entries_is_limited() {
        let root = worker(&["opt/decnet/venv/lib/"]);
        for n in 0..=limits::LIB_ENTRIES {
            fs::write(root.path().join(format!("opt/decnet/venv/lib/{n}")), "").unwrap();
        }
        let problem = located(root.path()).unwrap_err();
        assert!(
            problem.ends_with(
                "/opt/decnet/venv/lib cannot be accessed: it has more than 4096 entries"
            ),
            "{problem}"
        );
    }

    #[test]
    fn fifo_is_not_opened() {
        let root = worker(&[]);
        for version in ["python3.11", "python3.12"] {
            add(root.path(), &format!("opt/decnet/venv/lib/{version}/site-packages/decnet/"));
        }
        let fifo = root.path().join("opt/decnet/venv/pyvenv.cfg");
        assert!(std::process::Command::new("mkfifo").arg(fifo).status().unwrap().success());
        assert!(
            located(root.path())
                .unwrap_err()
                .ends_with("pyvenv.cfg cannot be accessed: not a regular file")
        );
    }

    #[test]
    fn missing_state_file_means_nothing_deployed_only_if_its_folder_exists() {
        let root = worker(&["state/", "file"]);
        let problem = |path: &str| means_nothing_deployed(&root.path().join(path)).unwrap_err();
        means_nothing_deployed(&root.path().join("state/none.json")).unwrap();
        means_nothing_deployed(Path::new("no-such-file.json")).unwrap();
        means_nothing_deployed(Path::new("")).unwrap_err();
        assert!(
            problem("none/none.json")
                .ends_with("none cannot be accessed: No such file or directory (os error 2)")
        );
        symlink(root.path().join("none/x.json"), root.path().join("state/link.json")).unwrap();
        assert_eq!(problem("state/link.json"), "is a symlink to a file that does not exist");
    }
}
