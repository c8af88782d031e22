//! Words for a POSIX shell.

/// Quotes one word, so that a shell takes it for exactly that.
pub fn quote(word: &[u8]) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for &byte in word {
        if byte == b'\'' {
            quoted.extend(b"'\\''");
        } else {
            quoted.push(byte);
        }
    }
    quoted.push(b'\'');
    quoted
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_shell_takes_a_quoted_word_back_apart_unchanged() {
        for word in ["", "plain", "two words", "it's", "$HOME `id` \\ \"x\" * ; & | <\n>", "--", "\u{fc}"] {
            let line = [b"printf %s ".as_slice(), &quote(word.as_bytes())].concat();
            let output = Command::new("sh").arg("-c").arg(OsStr::from_bytes(&line)).output().unwrap();
            assert_eq!(output.stdout, word.as_bytes());
        }
    }
}
