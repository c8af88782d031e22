//! Finding the program of a process.
//!
//! The rules are those of Go's `exec.LookPath`, which runc uses, and so are the words of [`AgentError`].

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{self, AccessFlags};
use rvm_protocol::{AgentError, AgentErrorKind};

use super::environment::Environment;
use crate::error::{Result, errno_text};

/// Finds the program that a process's first argument names, with the rights of the calling process.
pub fn find(name: &str, environment: &Environment) -> Result<PathBuf> {
    if name.contains('/') {
        return check(Path::new(name)).map(|()| name.into()).map_err(|failure| failure.into_error(name));
    }
    let path = environment.get("PATH").unwrap_or_default();
    for directory in path.split(':').filter(|_| !path.is_empty()) {
        let directory = if directory.is_empty() { "." } else { directory };
        let candidate = Path::new(directory).join(name);
        if check(&candidate).is_err() {
            continue;
        }
        if candidate.is_absolute() {
            return Ok(candidate);
        }
        let cause = "cannot run executable found relative to current directory";
        return Err(AgentError::not_executable(name, cause));
    }
    Err(AgentError::not_in_path(name))
}

/// What `execve` itself had to say.
pub fn execution_error(program: &Path, errno: Errno) -> AgentError {
    let kind = match errno {
        Errno::ENOENT => AgentErrorKind::NotFound,
        _ => AgentErrorKind::NotExecutable,
    };
    AgentError { kind, message: format!("exec {}: {}", program.display(), errno_text(errno)) }
}

enum Failure {
    Stat(Errno),
    Access(Errno),
}

impl Failure {
    fn into_error(self, name: &str) -> AgentError {
        match self {
            Failure::Stat(errno) => {
                let kind = match errno {
                    Errno::ENOENT | Errno::ENOTDIR => AgentErrorKind::NotFound,
                    _ => AgentErrorKind::NotExecutable,
                };
                AgentError::no_program(kind, name, &errno_text(errno))
            }
            Failure::Access(errno) => AgentError::not_executable(name, &errno_text(errno)),
        }
    }
}

fn check(path: &Path) -> std::result::Result<(), Failure> {
    let found = nix::sys::stat::stat(path).map_err(Failure::Stat)?;
    if found.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(Failure::Access(Errno::EISDIR));
    }
    unistd::eaccess(path, AccessFlags::X_OK).map_err(Failure::Access)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn directory_with(name: &str, mode: u32) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        directory
    }

    fn environment(path: &str) -> Environment {
        Environment::of(&[format!("PATH={path}")])
    }

    #[test]
    fn the_first_executable_of_the_path_is_taken() {
        let plain = directory_with("tool", 0o644);
        let good = directory_with("tool", 0o755);
        let path = format!("/nonexistent:{}:{}", plain.path().display(), good.path().display());
        assert_eq!(find("tool", &environment(&path)).unwrap(), good.path().join("tool"));
    }

    #[test]
    fn a_missing_program_is_told_in_runcs_words() {
        for environment in [environment("/nonexistent"), environment(""), Environment::default()] {
            let error = find("foo", &environment).unwrap_err();
            assert_eq!(error.kind, AgentErrorKind::NotFound);
            assert_eq!(error.message, r#"exec: "foo": executable file not found in $PATH"#);
        }
        let error = find("/nope", &Environment::default()).unwrap_err();
        assert_eq!(error.kind, AgentErrorKind::NotFound);
        assert_eq!(error.message, r#"exec: "/nope": stat /nope: no such file or directory"#);
    }

    #[test]
    fn a_program_that_may_not_run_is_told_in_runcs_words() {
        let plain = directory_with("x", 0o644);
        let path = plain.path().join("x");
        let name = path.to_str().unwrap();
        let error = find(name, &Environment::default()).unwrap_err();
        assert_eq!(error.kind, AgentErrorKind::NotExecutable);
        assert_eq!(error.message, format!("exec: {name:?}: permission denied"));
        let error = find("/etc/", &Environment::default()).unwrap_err();
        assert_eq!(error.message, r#"exec: "/etc/": is a directory"#);
    }

    #[test]
    fn a_failing_execve_tells_the_program() {
        let error = execution_error(Path::new("/bin/x"), Errno::ENOEXEC);
        assert_eq!(error.message, "exec /bin/x: exec format error");
        assert_eq!(error.kind, AgentErrorKind::NotExecutable);
        assert_eq!(execution_error(Path::new("/x"), Errno::ENOENT).kind, AgentErrorKind::NotFound);
    }
}
