//! What happens when the command line cannot be understood: the message goes to the log too, where engines look.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, ValueEnum};

use super::Arguments;
use crate::error::{EXEC_FAILURE, FAILURE};
use crate::logging::{Log, LogFormat};

/// Help and version are no failure; all else ends as any failed command does, since engines take the exit status 2
/// for that of a program.
pub(super) fn refuse(error: &clap::Error, words: &[OsString]) -> ExitCode {
    let _ = error.print();
    if error.exit_code() == 0 {
        return ExitCode::SUCCESS;
    }
    let line = GlobalFlags::of(words);
    if let Ok(log) = Log::open(line.log.as_deref(), line.format, false) {
        log.error_to_log(&first_paragraph(&error.to_string()));
    }
    let is_exec = line.subcommand.is_some_and(|name| name == "exec");
    ExitCode::from(if is_exec { EXEC_FAILURE } else { FAILURE })
}

/// The message without the advice that follows it.
fn first_paragraph(message: &str) -> String {
    let message = message.strip_prefix("error: ").unwrap_or(message);
    message.split("\n\n").next().unwrap_or(message).trim().to_owned()
}

/// What can be made out of a command line that is wrong somewhere.
#[derive(Debug, Default, PartialEq, Eq)]
struct GlobalFlags {
    log: Option<PathBuf>,
    format: LogFormat,
    subcommand: Option<OsString>,
}

impl GlobalFlags {
    fn of(words: &[OsString]) -> GlobalFlags {
        let command = Arguments::command();
        let takes_value = |name: &str| {
            command
                .get_arguments()
                .any(|argument| argument.get_long() == Some(name) && argument.get_action().takes_values())
        };
        let mut found = GlobalFlags::default();
        let mut words = words.iter().skip(1);
        while let Some(word) = words.next() {
            let Some(flag) = word.to_str().and_then(|word| word.strip_prefix("--")) else {
                if word.as_encoded_bytes().starts_with(b"-") {
                    continue;
                }
                // What follows are the subcommand's own flags.
                found.subcommand = Some(word.clone());
                break;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(OsStr::new(value))),
                None if takes_value(flag) => (flag, words.next().map(OsString::as_os_str)),
                None => (flag, None),
            };
            match (name, value) {
                ("log", Some(value)) => found.log = Some(value.into()),
                ("log-format", Some(value)) => {
                    let format = value.to_str().and_then(|value| LogFormat::from_str(value, false).ok());
                    found.format = format.unwrap_or_default();
                }
                _ => {}
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(line: &str) -> GlobalFlags {
        let words: Vec<_> = line.split(' ').map(OsString::from).collect();
        GlobalFlags::of(&words)
    }

    #[test]
    fn the_log_is_found_on_a_line_that_is_wrong_elsewhere() {
        let wanted = GlobalFlags {
            log: Some("/l".into()),
            format: LogFormat::Json,
            subcommand: Some("create".into()),
        };
        assert_eq!(flags("rvm --root /exec --nonsense --log /l --log-format json create --what"), wanted);
        assert_eq!(flags("rvm --log=/l --debug --log-format=json create"), wanted);
        assert_eq!(flags("rvm exec c ls --log /l").log, None, "that is the command's own");
        assert_eq!(flags("rvm --log").log, None);
    }

    #[test]
    fn the_message_loses_its_advice() {
        let message = "error: unexpected argument '--x' found\n\nUsage: rvm [OPTIONS] <COMMAND>\n";
        assert_eq!(first_paragraph(message), "unexpected argument '--x' found");
    }
}
