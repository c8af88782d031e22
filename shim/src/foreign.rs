//! Text from the guest, made fit for the host: a terminal must not obey it, and a log not be filled with it.

use rvm_protocol::{FromAgent, Reply};

/// The most characters of one text.
const MAX_LENGTH: usize = 4096;

/// One line without anything that a terminal takes for a command or that reverses the order of letters.
pub fn tame(text: &str) -> String {
    let visible = text.chars().filter_map(|char| match char {
        '\n' | '\r' | '\t' => Some(' '),
        // Marks that turn the direction of writing (Unicode, annex 9).
        '\u{200e}' | '\u{200f}' | '\u{061c}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => None,
        char if char.is_control() => None,
        char => Some(char),
    });
    let mut tame: String = visible.take(MAX_LENGTH + 1).collect();
    if let Some((end, _)) = tame.char_indices().nth(MAX_LENGTH) {
        tame.truncate(end);
        tame.push('…');
    }
    tame
}

/// A message with all its texts tamed.
pub fn tame_message(mut message: FromAgent) -> FromAgent {
    match &mut message {
        FromAgent::Ready { kernel: text, .. } => *text = tame(text),
        FromAgent::Reply { result: Err(error), .. } => error.message = tame(&error.message),
        FromAgent::Reply { result: Ok(Reply::Processes(processes)), .. } => {
            processes.iter_mut().for_each(|process| process.command = tame(&process.command));
        }
        FromAgent::Reply { .. } | FromAgent::Exited { .. } | FromAgent::OutOfMemory => {}
    }
    message
}

#[cfg(test)]
mod tests {
    use rvm_protocol::{AgentError, AgentErrorKind};

    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_left_out() {
        assert_eq!(tame("a\x1b[31mb\u{9b}1mc\x07"), "a[31mb1mc");
        assert_eq!(tame("one\r\ntwo"), "one  two");
        assert_eq!(tame("exe.\u{202e}txt"), "exe.txt");
        assert_eq!(tame("grün"), "grün");
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let text = tame(&"ü".repeat(MAX_LENGTH * 2));
        assert_eq!(text.chars().count(), MAX_LENGTH + 1);
        assert!(text.ends_with("ü…"));
        assert_eq!(tame(&"x".repeat(MAX_LENGTH)).len(), MAX_LENGTH);
    }

    #[test]
    fn an_error_of_the_agent_is_tamed() {
        let error = AgentError { kind: AgentErrorKind::Other, message: "\x1b]0;title\x07".into() };
        let FromAgent::Reply { result: Err(error), .. } =
            tame_message(FromAgent::Reply { request: 1, result: Err(error) })
        else {
            panic!("another message")
        };
        assert_eq!(error.message, "]0;title");
    }
}
