use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn key(number: u8) -> Key {
    format!("{number:020x}").parse().unwrap()
}

/// A store with a template of each of these numbers, whose memory takes so many bytes.
fn store(numbers: &[u8], size: usize) -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path().join("templates"));
    for number in numbers {
        let lock = store.lock(false).unwrap().unwrap();
        let mut unfinished = store.begin(&lock).unwrap();
        unfinished.memory.write_all(&vec![7; size]).unwrap();
        let found = unfinished.memory.metadata().unwrap();
        unfinished.write(&Record::for_test(&found)).unwrap();
        unfinished.open().unwrap();
        unfinished.finish(key(*number)).unwrap();
    }
    (folder, store)
}

fn refusal(store: &Store) -> String {
    store.find(key(1)).unwrap_err().to_string()
}

#[test]
fn what_was_made_is_found() {
    let (_folder, store) = store(&[1, 2], 100);
    assert!(store.find(key(1)).unwrap().is_some());
    assert!(store.has(key(2)) && !store.has(key(3)));
    assert!(store.find(key(3)).unwrap().is_none());
    assert_eq!(store.list().unwrap().iter().map(|listed| listed.key).collect::<Vec<_>>(), [key(1), key(2)]);
    store.remove(key(1)).unwrap();
    assert!(store.find(key(1)).unwrap().is_none());
    assert!(matches!(store.remove(key(1)), Err(TemplateError::Absent(_))));
}

#[test]
fn without_a_store_there_is_no_template() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path().join("absent"));
    assert!(store.find(key(1)).unwrap().is_none());
    assert!(store.list().unwrap().is_empty());
    assert!(!store.has_failed_lately());
}

#[test]
fn memory_that_was_touched_is_refused() {
    let (_folder, store) = store(&[1], 100);
    let memory = store.path().join(key(1).to_string()).join(MEMORY);
    let content = fs::read(&memory).unwrap();
    // The same bytes again.
    fs::write(&memory, &content).unwrap();
    assert!(refusal(&store).contains("changed or copied"), "{}", refusal(&store));
    fs::write(&memory, &content[1..]).unwrap();
    assert!(refusal(&store).contains("changed or copied"));
}

#[test]
fn a_copy_is_refused() {
    let (folder, store) = store(&[1], 100);
    let path = store.path().join(key(1).to_string());
    let aside = folder.path().join("aside");
    fs::rename(path.join(MEMORY), &aside).unwrap();
    fs::copy(&aside, path.join(MEMORY)).unwrap();
    assert!(refusal(&store).contains("changed or copied"));
}

#[test]
fn a_state_that_was_touched_is_refused() {
    let (_folder, store) = store(&[1], 100);
    let path = store.path().join(key(1).to_string()).join(STATE);
    let content = fs::read(&path).unwrap();
    for position in 0..content.len() {
        let mut damaged = content.clone();
        damaged[position] ^= 1;
        fs::write(&path, damaged).unwrap();
        assert!(store.find(key(1)).is_err(), "{position}");
    }
    fs::write(&path, &content[..content.len() - 1]).unwrap();
    assert!(store.find(key(1)).is_err());
    fs::write(&path, &content).unwrap();
    assert!(store.find(key(1)).unwrap().is_some());
}

#[test]
fn what_others_could_have_written_is_refused() {
    let (_folder, store) = store(&[1], 100);
    let folder = store.path().join(key(1).to_string());
    for path in [store.path().to_owned(), folder.clone(), folder.join(STATE), folder.join(MEMORY)] {
        let before = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, Permissions::from_mode(before.mode() | 0o020)).unwrap();
        assert!(refusal(&store).contains("others than its owner"), "{path:?}");
        fs::set_permissions(&path, before).unwrap();
    }
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(folder.join(STATE), Some(1234), None).unwrap();
        assert!(refusal(&store).contains("another user"));
    }
}

#[test]
fn symbolic_links_are_refused() {
    let (aside, store) = store(&[1], 100);
    let folder = store.path().join(key(1).to_string());
    for name in [STATE, MEMORY] {
        let (path, target) = (folder.join(name), aside.path().join(name));
        fs::rename(&path, &target).unwrap();
        symlink(&target, &path).unwrap();
        assert!(refusal(&store).contains("symbolic link"), "{}", refusal(&store));
        fs::remove_file(&path).unwrap();
        fs::rename(&target, &path).unwrap();
    }
    let target = aside.path().join("folder");
    fs::rename(&folder, &target).unwrap();
    symlink(&target, &folder).unwrap();
    assert!(refusal(&store).contains("symbolic link"), "{}", refusal(&store));
    store.remove(key(1)).unwrap();
    assert!([STATE, MEMORY].iter().all(|name| target.join(name).exists()), "what a link leads to stays");
}

#[test]
fn one_at_a_time_makes_a_template() {
    let (_folder, store) = store(&[], 0);
    let lock = store.lock(false).unwrap().unwrap();
    assert!(store.lock(false).unwrap().is_none());
    drop(lock);
    assert!(store.lock(false).unwrap().is_some());
}

#[test]
fn what_is_not_finished_vanishes() {
    let (_folder, store) = store(&[], 0);
    let lock = store.lock(false).unwrap().unwrap();
    drop(store.begin(&lock).unwrap());
    let unfinished = store.begin(&lock).unwrap();
    // As one that was killed.
    std::mem::forget(unfinished);
    let unfinished = store.begin(&lock).unwrap();
    assert!(store.list().unwrap().is_empty());
    drop(unfinished);
    let names: Vec<_> = fs::read_dir(store.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [LOCK]);
}

#[test]
fn the_least_used_go_first() {
    let (_folder, store) = store(&[1, 2, 3], 1 << 20);
    let long_ago = |number, seconds| {
        let folder = File::open(store.path().join(key(number).to_string())).unwrap();
        folder.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
    };
    (1..=3).for_each(|number| long_ago(number, 1000 + u64::from(number)));
    store.find(key(3)).unwrap();
    store.shrink_to(key(1), 2 << 20 | 64 << 10).unwrap();
    let left: Vec<_> = store.list().unwrap().iter().map(|listed| listed.key).collect();
    assert_eq!(left, [key(1), key(3)]);
}

#[test]
fn a_failure_is_remembered_for_a_while() {
    let (_folder, store) = store(&[1], 1);
    assert!(!store.has_failed_lately());
    store.note_failure();
    assert!(store.has_failed_lately());
    let failed = File::open(store.path().join(FAILED)).unwrap();
    failed.set_modified(SystemTime::now() - AFTER_FAILURE).unwrap();
    assert!(!store.has_failed_lately());
}

#[test]
fn a_template_can_be_given_up_while_it_is_in_use() {
    let (_folder, store) = store(&[1], 1);
    let template = store.find(key(1)).unwrap().unwrap();
    template.discard();
    assert!(store.find(key(1)).unwrap().is_none());
    assert!(!store.has(key(1)));
}
