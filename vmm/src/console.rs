//! The last lines of the guest's kernel messages, kept for the moment when they are needed.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How much is kept.
const CAPACITY: usize = 64 << 10;

/// What the guest's serial port wrote. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Console {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    bytes: VecDeque<u8>,
    mirror: Option<Box<dyn Write + Send>>,
}

impl Console {
    /// The text that is left. When older text is lost, it starts with a whole line.
    pub(crate) fn text(&self) -> String {
        let mut inner = self.lock();
        let is_cut = inner.bytes.len() == CAPACITY;
        let bytes: &[u8] = inner.bytes.make_contiguous();
        let start = match bytes.iter().position(|byte| *byte == b'\n') {
            Some(newline) if is_cut => newline + 1,
            _ => 0,
        };
        String::from_utf8_lossy(&bytes[start..]).into_owned()
    }

    /// Writes all that comes from now on to `mirror`, too.
    pub(crate) fn mirror_to(&self, mirror: Box<dyn Write + Send>) {
        self.lock().mirror = Some(mirror);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Console {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut inner = self.lock();
        for byte in data {
            if inner.bytes.len() == CAPACITY {
                inner.bytes.pop_front();
            }
            inner.bytes.push_back(*byte);
        }
        if let Some(mirror) = &mut inner.mirror {
            // A mirror that is gone is no reason to lose the messages.
            let _ = mirror.write_all(data).and_then(|()| mirror.flush());
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_kept_while_there_is_room() {
        let mut console = Console::default();
        console.write_all(b"one\ntwo\n\xff").unwrap();
        assert_eq!(console.clone().text(), "one\ntwo\n\u{fffd}");
    }

    #[test]
    fn the_last_whole_lines_stay() {
        let mut console = Console::default();
        for number in 0..10_000 {
            writeln!(console, "line {number}").unwrap();
        }
        let text = console.text();
        assert!(text.len() <= CAPACITY && text.len() > CAPACITY - 20);
        assert!(text.starts_with("line ") && text.ends_with("line 9999\n"));
    }

    #[test]
    fn text_without_lines_is_no_reason_to_show_nothing() {
        let mut console = Console::default();
        console.write_all(&vec![b'x'; CAPACITY + 1]).unwrap();
        assert_eq!(console.text().len(), CAPACITY);
    }
}
