//! Where the text of a kernel is in the guest's memory: in parts, as some of it is freed after the start.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{MAX_LENGTH, SharedBootError};
use crate::pagemap::PAGE;

/// No kernel has more: what stays, and what is freed after the start.
const MOST: usize = 4;

/// Where the parts of a text are, in the order of their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Parts(pub(super) Vec<Range<u64>>);

impl Parts {
    /// Adds what the guest's kernel names, in pages. Two 32-bit numbers of pages do not overflow.
    pub(super) fn add(&mut self, first: u32, pages: u32) {
        if self.0.len() < MOST {
            let start = u64::from(first) * PAGE;
            self.0.push(start..start + u64::from(pages) * PAGE);
        }
    }

    /// The length of all of them in bytes, if they can be parts of a kernel that lies there.
    pub(super) fn length(&self, kernel: &Range<u64>) -> Result<u64, SharedBootError> {
        let mut sum: u64 = 0;
        let mut end = kernel.start;
        for part in &self.0 {
            if !part.start.is_multiple_of(PAGE) || !part.end.is_multiple_of(PAGE) {
                return Err(SharedBootError::Impossible("bounds within a page"));
            }
            if part.start < end || part.end > kernel.end {
                return Err(SharedBootError::Impossible("another place than the kernel"));
            }
            let length = part.end.checked_sub(part.start).filter(|length| (1..=MAX_LENGTH).contains(length));
            sum += length.ok_or(SharedBootError::Impossible("a length that no kernel has"))?;
            end = part.end;
        }
        let is_possible = sum <= MAX_LENGTH && (1..=MOST).contains(&self.0.len());
        is_possible.then_some(sum).ok_or(SharedBootError::Impossible("a length that no kernel has"))
    }

    /// What lies between them in `whole`.
    pub(super) fn gaps(&self, whole: &Range<u64>) -> Vec<Range<u64>> {
        let starts = std::iter::once(whole.start).chain(self.0.iter().map(|part| part.end));
        let ends = self.0.iter().map(|part| part.start).chain(std::iter::once(whole.end));
        starts.zip(ends).filter(|(start, end)| start < end).map(|(start, end)| start..end).collect()
    }

    /// The pages in which two versions differ.
    pub(super) fn differing(&self, left: &[u8], right: &[u8]) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for (part, place) in self.placed() {
            for page in part.start / PAGE..part.end / PAGE {
                let at = (place + page * PAGE - part.start) as usize;
                let bytes = at..at + PAGE as usize;
                if left.get(bytes.clone()) == right.get(bytes) {
                    continue;
                }
                match found.last_mut().filter(|last| last.end == page) {
                    Some(last) => last.end += 1,
                    None => found.push(page..page + 1),
                }
            }
        }
        found
    }

    /// Each part, and where it begins if they are put behind one another.
    pub(super) fn placed(&self) -> impl Iterator<Item = (&Range<u64>, u64)> {
        self.0.iter().scan(0, |next, part| {
            let place = *next;
            *next += part.end - part.start;
            Some((part, place))
        })
    }
}
