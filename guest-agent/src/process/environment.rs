//! The environment of a process.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;

use crate::error::{Result, other};

/// A user database is read to here at most; whatever the image holds in its place.
const MAX_PASSWD: u64 = 4 << 20;

/// The environment of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    variables: Vec<String>,
}

impl Environment {
    /// The variables of a description. As with runc, the last of several of one name wins, at the place of
    /// the first.
    pub fn of(variables: &[String]) -> Self {
        let mut kept: Vec<String> = Vec::with_capacity(variables.len());
        for variable in variables {
            let name = name(variable);
            match kept.iter_mut().find(|known| self::name(known) == name) {
                Some(known) => known.clone_from(variable),
                None => kept.push(variable.clone()),
            }
        }
        Self { variables: kept }
    }

    /// All variables, each as `NAME=VALUE`.
    pub fn variables(&self) -> &[String] {
        &self.variables
    }

    /// The value of a variable.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.iter().find_map(|variable| variable.strip_prefix(name)?.strip_prefix('='))
    }

    /// Sets `HOME` where it is not set, from the container's user database.
    pub fn set_home(&mut self, user: u32) {
        if self.get("HOME").is_none_or(str::is_empty) {
            let home = open_regular("/etc/passwd").and_then(|file| home(file, user));
            self.variables.retain(|variable| name(variable) != "HOME");
            self.variables.push(format!("HOME={}", home.as_deref().unwrap_or("/")));
        }
    }

    /// The variables as `execve` wants them.
    pub fn to_c(&self) -> Result<Vec<CString>> {
        c_strings(&self.variables, "an environment variable")
    }
}

/// Texts as C wants them.
pub fn c_strings(texts: &[String], what: &str) -> Result<Vec<CString>> {
    let convert = |text: &String| CString::new(text.as_str());
    texts
        .iter()
        .map(convert)
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| other(format!("{what} holds a null byte")))
}

fn name(variable: &str) -> &str {
    variable.split_once('=').map_or(variable, |(name, _)| name)
}

/// Opens what is an ordinary file, and nothing else: an image may hold a FIFO in its place, whose opening would
/// wait for a writer.
fn open_regular(path: &str) -> Option<File> {
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).ok()?;
    file.metadata().ok()?.is_file().then_some(file)
}

/// The home directory of a user in a passwd(5) file.
fn home(passwd: impl Read, user: u32) -> Option<String> {
    let lines = BufReader::new(passwd.take(MAX_PASSWD)).split(b'\n');
    lines.map_while(std::result::Result::ok).find_map(|line| {
        let line = String::from_utf8_lossy(&line);
        let mut fields = line.split(':').skip(2);
        let found: u32 = fields.next()?.parse().ok()?;
        let home = fields.nth(2)?;
        (found == user && !home.is_empty()).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_of_several_variables_wins() {
        let variables = ["A=1", "B=2", "A=3", "NAKED"].map(str::to_owned);
        let environment = Environment::of(&variables);
        assert_eq!(environment.variables, ["A=3", "B=2", "NAKED"]);
        assert_eq!(environment.get("A"), Some("3"));
        assert_eq!(environment.get("NAKED"), None);
    }

    #[test]
    fn home_comes_from_the_user_database() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\napp:x:1000:1000::/srv/app:/bin/sh\n";
        assert_eq!(home(passwd.as_bytes(), 1000), Some("/srv/app".into()));
        assert_eq!(home(passwd.as_bytes(), 1), None);
    }

    #[test]
    fn a_home_that_is_set_stays() {
        let mut environment = Environment::of(&["HOME=/x".to_owned()]);
        environment.set_home(0);
        assert_eq!(environment.get("HOME"), Some("/x"));
    }

    #[test]
    fn only_an_ordinary_file_is_a_user_database() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("passwd");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(open_regular(path.to_str().unwrap()).is_none());
        assert!(open_regular("/dev/null").is_none());
        assert!(open_regular("/etc/passwd").is_some());
    }

    #[test]
    fn a_null_byte_is_refused() {
        assert!(Environment::of(&["A=\0".to_owned()]).to_c().is_err());
    }

    proptest! {
        #[test]
        fn no_user_database_causes_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = home(bytes.as_slice(), 0);
        }
    }
}
