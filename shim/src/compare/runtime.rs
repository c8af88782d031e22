//! The runtimes that are compared, and the commands with which each starts, enters and ends a container.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::CompareError;
use super::bundle::TestBundle;
use crate::bundle::TEMPLATE;

/// How a runtime is named that is this program, with templates and without.
const OWN: &str = "rvm";
const OWN_COLD: &str = "rvm:cold";
/// What is compared if nothing is said, as far as it is installed.
const OTHERS: &[&str] = &["runc", "crun", "runsc", "youki"];

/// Options without which a runtime refuses a bundle that has a network namespace of its own with nothing in it.
const NEEDED: &[(&str, &str)] = &[("runsc", "--network=none")];

/// One of the runtimes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime {
    /// What the user calls it.
    pub name: String,
    /// The program and the options that precede its command.
    program: Vec<String>,
    /// Whether this is rvm, which must boot each container's kernel.
    pub cold: bool,
    /// Whether it can tell the phases of a start.
    pub has_phases: bool,
}

impl Runtime {
    /// `NAME` is this program, with `:cold` without templates, or one to be found in PATH; `NAME=COMMAND` is called
    /// by that command line.
    ///
    /// # Errors
    ///
    /// There is no such program.
    pub fn parse(text: &str) -> Result<Runtime, CompareError> {
        let (name, command) =
            text.split_once('=').map_or((text, None), |(name, command)| (name, Some(command)));
        let own = matches!(name, OWN | OWN_COLD);
        let program = match command {
            Some(command) => command.split_ascii_whitespace().map(str::to_owned).collect(),
            None if own => vec![own_program()?],
            None => {
                let program = find(name).ok_or_else(|| CompareError::NotInstalled(name.to_owned()))?;
                let needed = NEEDED.iter().filter(|(runtime, _)| *runtime == name);
                std::iter::once(program).chain(needed.map(|(_, option)| (*option).to_owned())).collect()
            }
        };
        if name.is_empty() || program.is_empty() {
            return Err(CompareError::NoRuntime(text.to_owned()));
        }
        Ok(Runtime { name: name.to_owned(), program, cold: name == OWN_COLD, has_phases: own })
    }

    /// rvm, and those of its peers that are installed.
    pub fn all() -> Result<Vec<Runtime>, CompareError> {
        let peers = OTHERS.iter().filter(|name| find(name).is_some());
        [OWN, OWN_COLD].iter().chain(peers).map(|name| Runtime::parse(name)).collect()
    }

    /// The same names as Docker knows them.
    pub fn of_docker(name: &str) -> Runtime {
        let cold = name == OWN_COLD;
        Runtime { name: name.to_owned(), program: Vec::new(), cold, has_phases: false }
    }

    /// Those that Docker has been given, each once.
    ///
    /// # Errors
    ///
    /// Docker does not answer.
    pub fn all_of_docker() -> Result<Vec<Runtime>, CompareError> {
        let mut question = docker(&["info", "--format", "{{json .Runtimes}}"]);
        let answer =
            question.stdout(Stdio::piped()).output().map_err(CompareError::system("cannot start docker"))?;
        let known: Value = serde_json::from_slice(&answer.stdout)
            .map_err(|_| CompareError::Docker(String::from_utf8_lossy(&answer.stderr).trim().to_owned()))?;
        let names = known.as_object().into_iter().flat_map(|known| known.keys());
        // The long names are those of shims that the short ones stand for.
        let short = names.filter(|name| !name.contains('.')).flat_map(|name| match name.as_str() {
            OWN => vec![OWN, OWN_COLD],
            other => vec![other],
        });
        Ok(short.map(Runtime::of_docker).collect())
    }

    fn command(&self) -> Command {
        // Those of Docker are never called directly.
        let mut command = Command::new(self.program.first().map_or("", String::as_str));
        command
            .args(self.program.iter().skip(1))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }
}

fn own_program() -> Result<String, CompareError> {
    let path = std::env::current_exe().map_err(CompareError::system("cannot find this program"))?;
    Ok(path.to_string_lossy().into_owned())
}

fn find(program: &str) -> Option<String> {
    let path = std::env::var_os("PATH")?;
    let found =
        std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())?;
    Some(found.to_string_lossy().into_owned())
}

/// Through what the runtimes are called.
#[derive(Debug)]
pub enum Caller {
    /// Directly, with bundles.
    Bundles {
        /// What ends at once.
        short: TestBundle,
        /// What stays until it is killed.
        long: TestBundle,
        /// Where they keep their state.
        state: PathBuf,
    },
    /// Through Docker, with an image.
    Docker {
        /// The image.
        image: String,
    },
}

impl Caller {
    /// From the start of a container to its end; the program in it ends at once. Where the phases of a start are known,
    /// they are told as JSON on standard error.
    pub fn start(&self, runtime: &Runtime, id: &str) -> Command {
        match self {
            Caller::Bundles { short, .. } => {
                let mut command = self.bundled(runtime);
                command.arg("run").args(runtime.has_phases.then_some("--timeline=json"));
                command.arg("--bundle").arg(short.path(runtime.cold)).arg(id);
                command
            }
            Caller::Docker { image } => {
                let mut command = docker(&["run", "--rm"]);
                through_docker(&mut command, runtime).arg(image).arg("true");
                command
            }
        }
    }

    /// Starts a container that stays, and may keep standard error for as long.
    pub fn begin(&self, runtime: &Runtime, id: &str) -> Command {
        match self {
            Caller::Bundles { long, .. } => {
                let mut command = self.bundled(runtime);
                command.args(["run", "--detach", "--bundle"]).arg(long.path(runtime.cold)).arg(id);
                command
            }
            Caller::Docker { image } => {
                let mut command = docker(&["run", "--detach", "--name", id]);
                through_docker(&mut command, runtime).arg(image).args(["sleep", "100000"]);
                command
            }
        }
    }

    /// Runs a program that ends at once in a container that stays.
    pub fn exec(&self, runtime: &Runtime, id: &str) -> Command {
        match self {
            Caller::Bundles { .. } => self.in_container(runtime, id, &["/true"]),
            Caller::Docker { .. } => self.in_container(runtime, id, &["true"]),
        }
    }

    /// Asks for the container's kernel: release and version, on standard output.
    pub fn kernel(&self, runtime: &Runtime, id: &str) -> Command {
        let mut command = match self {
            Caller::Bundles { .. } => self.in_container(runtime, id, &["/kernel"]),
            Caller::Docker { .. } => self.in_container(runtime, id, &["uname", "-rv"]),
        };
        command.stdout(Stdio::piped());
        command
    }

    /// Asks for the process that is the container on the host: as JSON, on standard output.
    pub fn process(&self, runtime: &Runtime, id: &str) -> Command {
        let mut command = match self {
            Caller::Bundles { .. } => {
                let mut command = self.bundled(runtime);
                command.args(["state", id]);
                command
            }
            Caller::Docker { .. } => docker(&["inspect", "--format", "{{.State.Pid}}", id]),
        };
        command.stdout(Stdio::piped());
        command
    }

    /// Ends a container that stays, and removes it.
    pub fn end(&self, runtime: &Runtime, id: &str) -> Command {
        match self {
            Caller::Bundles { .. } => {
                let mut command = self.bundled(runtime);
                command.args(["delete", "--force", id]);
                command
            }
            Caller::Docker { .. } => docker(&["rm", "--force", id]),
        }
    }

    fn in_container(&self, runtime: &Runtime, id: &str, words: &[&str]) -> Command {
        let mut command = match self {
            Caller::Bundles { .. } => self.bundled(runtime),
            Caller::Docker { .. } => docker(&[]),
        };
        command.arg("exec").arg(id).args(words);
        command
    }

    fn bundled(&self, runtime: &Runtime) -> Command {
        let mut command = runtime.command();
        if let Caller::Bundles { state, .. } = self {
            // Each has a folder of its own: what one leaves there is nothing to the others.
            command.arg("--root").arg(state.join(file_name(&runtime.name)));
        }
        command
    }
}

/// A name without anything that means something in a path.
fn file_name(name: &str) -> PathBuf {
    let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '-' };
    Path::new(&name.chars().map(plain).collect::<String>()).to_owned()
}

fn docker(words: &[&str]) -> Command {
    let mut command = Command::new("docker");
    command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn through_docker<'a>(command: &'a mut Command, runtime: &Runtime) -> &'a mut Command {
    // The name after the colon is this program's, not Docker's.
    let name = runtime.name.split(':').next().unwrap_or_default();
    command.args(["--runtime", name]);
    if runtime.cold {
        command.arg("--annotation").arg(format!("{TEMPLATE}=off"));
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(command: &Command) -> Vec<String> {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| word.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn runtimes_are_named_found_or_given() {
        let cold = Runtime::parse("rvm:cold").unwrap();
        assert!(cold.cold && cold.has_phases && cold.program[0].starts_with('/'));
        let given = Runtime::parse("gvisor=runsc --platform=kvm").unwrap();
        assert_eq!(given.program, ["runsc", "--platform=kvm"]);
        assert!(!given.has_phases);
        assert!(Runtime::parse("sh").unwrap().program[0].ends_with("/sh"));
        let missing = Runtime::parse("no-such-runtime").unwrap_err().to_string();
        assert!(missing.contains("no-such-runtime") && missing.contains("PATH"), "{missing}");
        assert!(Runtime::parse("=x").is_err() && Runtime::parse("x= ").is_err());
    }

    #[test]
    fn docker_is_told_which_runtime_and_how() {
        let docker = Caller::Docker { image: "busybox".into() };
        let cold = Runtime::parse("rvm:cold").unwrap();
        assert_eq!(
            words(&docker.start(&cold, "one")).join(" "),
            "docker run --rm --runtime rvm --annotation dev.rvm.template=off busybox true"
        );
        let plain = Runtime::parse("runc=runc").unwrap();
        assert_eq!(
            words(&docker.begin(&plain, "two")).join(" "),
            "docker run --detach --name two --runtime runc busybox sleep 100000"
        );
    }
}
