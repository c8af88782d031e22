//! Whether the container's program can be executed, as far as that is certain before the guest has started.
//!
//! Engines want to be told by `create`, as runc does: podman makes no exit code of an error of `start`. The agent looks
//! again when it starts the process, with the rights of its user and over the guest's own mounts. So only what nobody
//! could execute is refused here, and whatever depends on the guest is left to it.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag, fstat};
use oci_spec::runtime::{Mount, Process, Spec};
use rvm_protocol::{AgentError, AgentErrorKind};

use super::walk::Walk;
use crate::bundle::is_bind;

/// The most steps of all lookups together. Links and PATH are the image's, which could make them endless.
const MAX_STEPS: usize = 4096;
/// The bits of a file's mode that let someone execute a file or search a directory.
const EXECUTABLE: u32 = 0o111;
const OWNER_EXECUTABLE: u32 = 0o100;

/// Refuses a container whose program is certain not to be executable, in the words of the agent.
pub(super) fn check(root: BorrowedFd<'_>, spec: &Spec) -> Result<(), AgentError> {
    let Some(process) = spec.process() else { return Ok(()) };
    let Some(name) = process.args().iter().flatten().next() else { return Ok(()) };
    let Some(mut search) = Search::new(root, spec, process) else { return Ok(()) };
    // With a slash or a dot at its end it has to be a directory, which is the guest's to say.
    if name.ends_with('/') || name.ends_with("/.") {
        return Ok(());
    }
    if name.contains('/') {
        let fault = search.fault(&process.cwd().join(name)).filter(|found| found.searchable);
        return fault.map_or(Ok(()), |found| Err(found.fault.into_error(name)));
    }
    let path = search_path(process);
    let mut candidates = path.split(':').filter(|_| !path.is_empty()).map(|directory| {
        // Whatever is not absolute, the empty one too, counts from the working directory.
        process.cwd().join(directory).join(name)
    });
    match candidates.all(|candidate| search.fault(&candidate).is_some()) {
        true => Err(AgentError::not_in_path(name)),
        false => Ok(()),
    }
}

/// The `PATH` of a process. As with the agent, the last of several wins.
fn search_path(process: &Process) -> &str {
    let variables = process.env().as_deref().unwrap_or_default().iter().rev();
    let mut split = variables.map(|variable| variable.split_once('=').unwrap_or((variable, "")));
    split.find(|(name, _)| *name == "PATH").map_or("", |(_, value)| value)
}

/// Why nobody can execute a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Missing,
    NotInDirectory,
    Directory,
    NotExecutable,
}

impl Fault {
    fn into_error(self, name: &str) -> AgentError {
        match self {
            Fault::Missing => {
                AgentError::no_program(AgentErrorKind::NotFound, name, "no such file or directory")
            }
            Fault::NotInDirectory => {
                AgentError::no_program(AgentErrorKind::NotFound, name, "not a directory")
            }
            Fault::Directory => AgentError::not_executable(name, "is a directory"),
            Fault::NotExecutable => AgentError::not_executable(name, "permission denied"),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Found {
    fault: Fault,
    /// Whether the process may search all directories on the way. Otherwise it would be told so, and nothing else.
    searchable: bool,
}

struct Search<'a> {
    root: BorrowedFd<'a>,
    /// What the guest makes: what is found below is not what the process will see.
    of_the_guest: Vec<PathBuf>,
    /// Whose process it is, where the guest knows users by the same numbers.
    user: Option<u32>,
    steps: usize,
}

impl<'a> Search<'a> {
    /// None when it is not certain what the guest makes.
    fn new(root: BorrowedFd<'a>, spec: &Spec, process: &Process) -> Option<Self> {
        let linux = spec.linux().as_ref();
        let mapped = linux.is_some_and(|linux| linux.uid_mappings().iter().flatten().next().is_some());
        let user = (!mapped).then(|| process.user().uid());
        let mut search = Search { root, of_the_guest: Vec::new(), user, steps: MAX_STEPS };
        let mounts = spec.mounts().iter().flatten().filter(|mount| !is_bind(mount)).map(Mount::destination);
        let devices = linux.and_then(|linux| linux.devices().as_ref()).into_iter().flatten();
        // The default devices are made there without being asked for.
        let made = mounts.chain(devices.map(|device| device.path())).map(PathBuf::as_path);
        for path in made.chain([Path::new("/dev")]) {
            let place = search.place(path)?;
            search.of_the_guest.push(place);
        }
        Some(search)
    }

    /// Where a path leads without links; where it ends too early, the first part of it that is missing.
    fn place(&mut self, path: &Path) -> Option<PathBuf> {
        let mut walk = Walk::new(self.root, path);
        loop {
            self.count_step()?;
            let next = walk.next_path();
            match walk.advance(None) {
                Ok(true) => {}
                Ok(false) => return Some(next),
                Err(Errno::ENOENT) if !walk.turns_back() => return Some(next),
                Err(_) => return None,
            }
        }
    }

    /// What keeps everybody from executing what is at a path; none when nothing does, or the guest has to find out.
    fn fault(&mut self, path: &Path) -> Option<Found> {
        let mut walk = Walk::new(self.root, path);
        let mut searchable = true;
        loop {
            self.count_step()?;
            let next = walk.next_path();
            if self.of_the_guest.iter().any(|place| next.starts_with(place)) {
                return None;
            }
            let here = fstat(walk.here()).ok()?;
            let fault = match walk.advance(None) {
                Ok(true) => None,
                Ok(false) => return Some(Found { fault: fault_of(&here)?, searchable }),
                Err(Errno::ENOENT) => Some(Fault::Missing),
                Err(Errno::ENOTDIR) => Some(Fault::NotInDirectory),
                Err(_) => return None,
            };
            searchable &= self.may_search(&here);
            if let Some(fault) = fault {
                return Some(Found { fault, searchable });
            }
        }
    }

    /// Whether the process may search a directory, whatever capabilities it has.
    fn may_search(&self, directory: &FileStat) -> bool {
        directory.st_mode & EXECUTABLE == EXECUTABLE
            || (self.user == Some(directory.st_uid) && directory.st_mode & OWNER_EXECUTABLE != 0)
    }

    fn count_step(&mut self) -> Option<()> {
        self.steps = self.steps.checked_sub(1)?;
        Some(())
    }
}

/// What is wrong with what a path leads to. Capabilities make up for missing bits only where one of them is set.
fn fault_of(found: &FileStat) -> Option<Fault> {
    if found.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits() {
        return Some(Fault::Directory);
    }
    (found.st_mode & EXECUTABLE == 0).then_some(Fault::NotExecutable)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::fd::AsFd;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use serde_json::{Value, json};
    use tempfile::TempDir;

    use super::*;

    /// A root with a program in `bin`, and a text in `etc`.
    fn root() -> TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), Permissions::from_mode(0o755)).unwrap();
        for directory in ["bin", "etc", "run"] {
            fs::create_dir(root.path().join(directory)).unwrap();
        }
        for (file, mode) in [("bin/tool", 0o755), ("etc/text", 0o644), ("bin/plain", 0o644)] {
            fs::write(root.path().join(file), "").unwrap();
            fs::set_permissions(root.path().join(file), Permissions::from_mode(mode)).unwrap();
        }
        root
    }

    fn spec(program: &str) -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": [program], "cwd": "/", "env": ["PATH=/sbin:/bin"], "user": {"uid": 0, "gid": 0},
            },
            "mounts": [
                {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/volume", "type": "bind", "source": "/srv"},
            ],
        })
    }

    fn check_in(root: &TempDir, spec: &Value) -> Result<(), AgentError> {
        let root = fs::File::open(root.path()).unwrap();
        check(root.as_fd(), &serde_json::from_value(spec.clone()).unwrap())
    }

    fn refused(root: &TempDir, program: &str) -> (AgentErrorKind, String) {
        let error = check_in(root, &spec(program)).expect_err(program);
        (error.kind, error.message)
    }

    #[test]
    fn a_program_that_is_there_is_left_to_the_guest() {
        let root = root();
        for program in ["tool", "/bin/tool", "./bin/tool", "/bin/../bin/tool"] {
            assert_eq!(check_in(&root, &spec(program)), Ok(()), "{program}");
        }
    }

    #[test]
    fn a_program_that_is_nowhere_is_refused_in_the_agents_words() {
        let root = root();
        for (program, cause) in [
            ("absent", "executable file not found in $PATH"),
            ("plain", "executable file not found in $PATH"),
            (".", "executable file not found in $PATH"),
            ("", "executable file not found in $PATH"),
            ("/bin/absent", "stat /bin/absent: no such file or directory"),
            ("./absent", "stat ./absent: no such file or directory"),
            ("/bin/tool/x", "stat /bin/tool/x: not a directory"),
            ("/volume/absent", "stat /volume/absent: no such file or directory"),
        ] {
            let expected = (AgentErrorKind::NotFound, format!("exec: {program:?}: {cause}"));
            assert_eq!(refused(&root, program), expected);
        }
    }

    #[test]
    fn what_nobody_can_execute_is_refused_in_the_agents_words() {
        let root = root();
        for (program, cause) in [("/etc/text", "permission denied"), ("/etc", "is a directory")] {
            let expected = (AgentErrorKind::NotExecutable, format!("exec: {program:?}: {cause}"));
            assert_eq!(refused(&root, program), expected);
        }
        fs::set_permissions(root.path().join("etc/text"), Permissions::from_mode(0o100)).unwrap();
        assert_eq!(check_in(&root, &spec("/etc/text")), Ok(()), "its owner can");
    }

    #[test]
    fn a_container_without_a_program_is_nothing_to_look_at() {
        let root = root();
        let mut without = spec("absent");
        without["process"]["args"] = json!(null);
        assert_eq!(check_in(&root, &without), Ok(()));
        without["process"] = json!(null);
        assert_eq!(check_in(&root, &without), Ok(()));
    }

    #[test]
    fn what_the_guest_mounts_is_not_certain() {
        let root = root();
        symlink("/run/tool", root.path().join("bin/linked")).unwrap();
        symlink("../run", root.path().join("etc/through")).unwrap();
        for program in ["/run/tool", "/proc/self/exe", "/dev/tool", "linked", "/etc/through/tool", "/run"] {
            assert_eq!(check_in(&root, &spec(program)), Ok(()), "{program}");
        }
        let mut over_run = spec("absent");
        over_run["process"]["env"] = json!(["PATH=/bin:/run"]);
        assert_eq!(check_in(&root, &over_run), Ok(()));
    }

    #[test]
    fn a_mount_of_the_guest_lies_where_its_links_lead() {
        let root = root();
        fs::create_dir(root.path().join("opt")).unwrap();
        symlink("opt", root.path().join("linked")).unwrap();
        let mut mounted = spec("/opt/sub/absent");
        assert!(check_in(&root, &mounted).is_err());
        for destination in ["/linked/sub", "/opt/sub", "/linked", "/", "/opt/other/../sub"] {
            mounted["mounts"] = json!([{"destination": destination, "type": "tmpfs"}]);
            assert_eq!(check_in(&root, &mounted), Ok(()), "{destination}");
        }
        mounted["mounts"] = json!([{"destination": "/linked/other", "type": "tmpfs"}]);
        assert!(check_in(&root, &mounted).is_err());
    }

    #[test]
    fn links_stay_in_the_root() {
        let root = root();
        symlink("/bin/sh", root.path().join("bin/absolute")).unwrap();
        symlink("../../../../../../bin/sh", root.path().join("bin/relative")).unwrap();
        for program in ["absolute", "relative"] {
            let expected = format!("exec: {program:?}: executable file not found in $PATH");
            assert_eq!(refused(&root, program).1, expected, "the host's shell is none of the container's");
        }
    }

    #[test]
    fn the_last_path_counts_and_a_relative_one_from_the_working_directory() {
        let root = root();
        let mut other = spec("tool");
        for (env, found) in [
            (json!(["PATH=/bin", "PATH=/etc"]), false),
            (json!(["PATH=/etc", "PATH=/bin"]), true),
            (json!(["PATH=/bin", "PATH"]), false),
            (json!(["PATHS=/bin"]), false),
            (json!([]), false),
        ] {
            other["process"]["env"] = env.clone();
            assert_eq!(check_in(&root, &other).is_ok(), found, "{env}");
        }
        other["process"]["cwd"] = json!("/bin");
        other["process"]["env"] = json!(["PATH=/etc::"]);
        assert_eq!(check_in(&root, &other), Ok(()), "that it may not be is the agent's to say");
    }

    #[test]
    fn what_a_user_may_not_look_into_is_left_to_the_guest() {
        let root = root();
        fs::set_permissions(root.path().join("etc"), Permissions::from_mode(0o700)).unwrap();
        let mut other = spec("/etc/absent");
        other["process"]["user"]["uid"] = json!(4711);
        assert_eq!(check_in(&root, &other), Ok(()));
        other["process"]["user"]["uid"] = json!(nix::unistd::geteuid().as_raw());
        assert!(check_in(&root, &other).is_err(), "its owner may");
        other["linux"] = json!({"uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1000}]});
        assert_eq!(check_in(&root, &other), Ok(()), "who that is depends on the mapping");
    }

    #[test]
    fn an_endless_search_is_left_to_the_guest() {
        let root = root();
        symlink("/loop", root.path().join("loop")).unwrap();
        assert_eq!(check_in(&root, &spec("/loop/x")), Ok(()));
        let mut long = spec("absent");
        long["process"]["env"] = json!([format!("PATH={}", "/bin:".repeat(MAX_STEPS))]);
        assert_eq!(check_in(&root, &long), Ok(()));
    }
}
