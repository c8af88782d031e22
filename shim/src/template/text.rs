//! The text of the guest's kernel, as the boot of a template's machine has left it, for machines that boot.
//!
//! It is kept in the store beside the templates, and trusted as they are. A kernel that does not ask for its text has an entry
//! all the same, which says so.

use std::fs::File;
use std::time::SystemTime;

use rvm_vmm::{RecordedText, SharedText, TextRecord};
use serde::{Deserialize, Serialize};

use super::key::FileIdentity;
use super::store::{Entry, Kept, Lock, check_identity, open_entry};
use super::{Key, Store, TemplateError, file};
use crate::container::shape::Shape;

/// What the folders of texts end with, behind the key of the kernel.
const SUFFIX: &str = ".text";
/// So many texts are kept.
const MOST: usize = 4;

#[derive(Serialize, Deserialize)]
struct State {
    file: FileIdentity,
    text: Option<TextRecord>,
}

/// The text of a kernel.
#[derive(Debug)]
pub struct KeptText {
    /// The text.
    pub text: SharedText,
    /// Where it is kept.
    pub kept: Kept,
}

impl Store {
    /// The text of a kernel. None if there is none; an error if there is one that cannot be used.
    pub fn text(&self, kernel: &File, shape: Shape) -> Result<Option<KeptText>, TemplateError> {
        let name = name(kernel, shape)?;
        let Some(store) = self.open()? else { return Ok(None) };
        let found = open_entry(&store, self.path(), &name)?;
        let Some(Entry { kept, mut state, memory }) = found else { return Ok(None) };
        let State { file, text } = file::read(&mut state)?;
        check_identity(&memory, &self.path().join(&name), &file)?;
        // Those that were not used for the longest time go first.
        kept.touch();
        let Some(text) = text else { return Ok(None) };
        Ok(Some(KeptText { text: SharedText::new(text, memory)?, kept }))
    }

    /// Whether it is known what the text of a kernel becomes, be it usable or not.
    pub(super) fn has_text(&self, kernel: &File, shape: Shape) -> bool {
        name(kernel, shape).is_ok_and(|name| self.has_named(&name))
    }

    /// Keeps the text of a kernel, or that it does not ask for one.
    pub(super) fn keep_text(
        &self,
        lock: &Lock,
        kernel: &File,
        shape: Shape,
        recorded: Option<&RecordedText>,
    ) -> Result<(), TemplateError> {
        let unfinished = self.begin(lock)?;
        let failed = || TemplateError::system("cannot write the text of the guest's kernel");
        recorded.map_or(Ok(()), |text| text.write_to(&unfinished.memory)).map_err(failed())?;
        let found = unfinished.memory.metadata().map_err(failed())?;
        let state = State { file: FileIdentity::of(&found), text: recorded.map(|text| text.record.clone()) };
        unfinished.write_state(&file::seal(&state))?;
        unfinished.finish_as(&name(kernel, shape)?)?;
        self.remove_texts_but(MOST)
    }

    /// Removes the text of a kernel, if there is one.
    pub fn remove_text(&self, kernel: &File, shape: Shape) -> Result<(), TemplateError> {
        self.remove_named(&name(kernel, shape)?).map(drop)
    }

    /// Removes texts until there are no more than so many, those first that have not been used for the longest time.
    pub fn remove_texts_but(&self, most: usize) -> Result<(), TemplateError> {
        if !self.path().exists() {
            return Ok(());
        }
        let used = |name: String| {
            let used = self.path().join(&name).symlink_metadata().and_then(|found| found.modified());
            (used.unwrap_or(SystemTime::UNIX_EPOCH), name)
        };
        let mut texts: Vec<_> = self.names()?.filter(|name| name.ends_with(SUFFIX)).map(used).collect();
        texts.sort_unstable();
        let surplus = texts.len().saturating_sub(most);
        texts[..surplus].iter().try_for_each(|(_, name)| self.remove_named(name).map(drop))
    }
}

fn name(kernel: &File, shape: Shape) -> Result<String, TemplateError> {
    let key = Key::of_text(kernel, shape).map_err(TemplateError::system("cannot look at the kernel"))?;
    Ok(format!("{key}{SUFFIX}"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    #[test]
    fn texts_that_were_used_last_stay() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        store.remove_texts_but(0).unwrap();
        let names = ["a.text", "b.text", "c.text", "d.text", "template"];
        for (age, name) in names.iter().enumerate() {
            fs::create_dir(folder.path().join(name)).unwrap();
            let used = SystemTime::now() - Duration::from_secs(100 * age as u64);
            File::open(folder.path().join(name)).unwrap().set_modified(used).unwrap();
        }
        let left = || names.map(|name| folder.path().join(name).exists());
        store.remove_texts_but(2).unwrap();
        assert_eq!(left(), [true, true, false, false, true]);
        store.remove_texts_but(0).unwrap();
        assert_eq!(left(), [false, false, false, false, true]);
    }

    #[test]
    fn that_a_kernel_does_not_ask_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("templates"));
        let kernel = tempfile::tempfile().unwrap();
        let shape = Shape { vcpus: 1, memory: 1 << 30, memory_limit: None };
        assert!(!store.has_text(&kernel, shape) && store.text(&kernel, shape).unwrap().is_none());
        let lock = store.lock(false).unwrap().unwrap();
        store.keep_text(&lock, &kernel, shape, None).unwrap();
        assert!(store.has_text(&kernel, shape) && store.text(&kernel, shape).unwrap().is_none());
        store.remove_text(&kernel, shape).unwrap();
        assert!(!store.has_text(&kernel, shape));
    }
}
