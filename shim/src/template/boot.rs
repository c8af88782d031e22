//! What machines that boot share, as the boot of a template's machine has left it: kernel, its text, and initramfs.
//!
//! It is kept in the store beside the templates, and trusted as they are. A kernel that does not ask for its text has an entry
//! all the same, which says so.

use std::time::SystemTime;

use rvm_vmm::{BootRecord, RecordedBoot, SharedBoot};
use serde::{Deserialize, Serialize};

use super::key::FileIdentity;
use super::store::{Entry, Kept, Lock, check_identity, open_entry};
use super::{Key, Store, TemplateError, file};

/// What the folders of boots end with, behind the key of kernel and agent.
const SUFFIX: &str = ".boot";
/// So many boots are kept.
const MOST: usize = 4;

#[derive(Serialize, Deserialize)]
struct State {
    file: FileIdentity,
    boot: Option<BootRecord>,
}

/// What machines can begin with.
#[derive(Debug)]
pub struct KeptBoot {
    /// It.
    pub boot: SharedBoot,
    /// Where it is kept.
    pub kept: Kept,
}

impl Store {
    /// What machines begin with. None if nothing is kept; an error if what is cannot be used.
    pub fn boot(&self, key: Key) -> Result<Option<KeptBoot>, TemplateError> {
        let name = name(key);
        let Some(store) = self.open()? else { return Ok(None) };
        let found = open_entry(&store, self.path(), &name)?;
        let Some(Entry { kept, mut state, memory }) = found else { return Ok(None) };
        let State { file, boot } = file::read(&mut state)?;
        check_identity(&memory, &self.path().join(&name), &file)?;
        // Those that were not used for the longest time go first.
        kept.touch();
        let Some(boot) = boot else { return Ok(None) };
        Ok(Some(KeptBoot { boot: SharedBoot::new(boot, memory)?, kept }))
    }

    /// Whether it is known what machines could share, be it usable or not.
    pub(super) fn has_boot(&self, key: Key) -> bool {
        self.has_named(&name(key))
    }

    /// Keeps what was recorded, or that this kernel does not ask for its text.
    pub(super) fn keep_boot(
        &self,
        lock: &Lock,
        key: Key,
        recorded: Option<&RecordedBoot>,
    ) -> Result<(), TemplateError> {
        let unfinished = self.begin(lock)?;
        let failed = || TemplateError::system("cannot keep the boot for others");
        recorded.map_or(Ok(()), |boot| boot.write_to(&unfinished.memory)).map_err(failed())?;
        let found = unfinished.memory.metadata().map_err(failed())?;
        let state = State { file: FileIdentity::of(&found), boot: recorded.map(|boot| boot.record.clone()) };
        unfinished.write_state(&file::seal(&state))?;
        unfinished.finish_as(&name(key))?;
        self.remove_boots_but(MOST)
    }

    /// Removes what is kept, if anything is.
    pub fn remove_boot(&self, key: Key) -> Result<(), TemplateError> {
        self.remove_named(&name(key)).map(drop)
    }

    /// Removes boots until there are no more than so many, those first that have not been used for the longest time.
    pub fn remove_boots_but(&self, most: usize) -> Result<(), TemplateError> {
        if !self.path().exists() {
            return Ok(());
        }
        let used = |name: String| {
            let used = self.path().join(&name).symlink_metadata().and_then(|found| found.modified());
            (used.unwrap_or(SystemTime::UNIX_EPOCH), name)
        };
        let mut boots: Vec<_> = self.names()?.filter(|name| name.ends_with(SUFFIX)).map(used).collect();
        boots.sort_unstable();
        let surplus = boots.len().saturating_sub(most);
        boots[..surplus].iter().try_for_each(|(_, name)| self.remove_named(name).map(drop))
    }
}

fn name(key: Key) -> String {
    format!("{key}{SUFFIX}")
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::time::Duration;

    use super::*;
    use crate::container::shape::Shape;

    #[test]
    fn boots_that_were_used_last_stay() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        store.remove_boots_but(0).unwrap();
        let names = ["a.boot", "b.boot", "c.boot", "d.boot", "template"];
        for (age, name) in names.iter().enumerate() {
            fs::create_dir(folder.path().join(name)).unwrap();
            let used = SystemTime::now() - Duration::from_secs(100 * age as u64);
            File::open(folder.path().join(name)).unwrap().set_modified(used).unwrap();
        }
        let left = || names.map(|name| folder.path().join(name).exists());
        store.remove_boots_but(2).unwrap();
        assert_eq!(left(), [true, true, false, false, true]);
        store.remove_boots_but(0).unwrap();
        assert_eq!(left(), [false, false, false, false, true]);
    }

    #[test]
    fn that_a_kernel_does_not_ask_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path().join("templates"));
        let [kernel, agent] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let shape = Shape { vcpus: 1, memory: 1 << 30, memory_limit: None };
        let key = Key::of_boot(&kernel, &agent, shape).unwrap();
        assert!(!store.has_boot(key) && store.boot(key).unwrap().is_none());
        let lock = store.lock(false).unwrap().unwrap();
        store.keep_boot(&lock, key, None).unwrap();
        assert!(store.has_boot(key) && store.boot(key).unwrap().is_none());
        store.remove_boot(key).unwrap();
        assert!(!store.has_boot(key));
    }
}
