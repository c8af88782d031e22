use proptest::prelude::*;

use super::port::{FIRST_PAGE, HASH, PAGES, PATCHED};
use super::*;
use crate::memory;

const SIZE: u64 = 32 << 20;
const KERNEL: Range<u64> = 16 << 20..24 << 20;
const TEXT: Range<u64> = 16 << 20..19 << 20;
/// Freed after the start.
const INIT: Range<u64> = (20 << 20) + PAGE..(20 << 20) + 8 * PAGE;
const INITRAMFS: [u8; 5000] = [9; 5000];
/// Where the initramfs of a machine comes that begins with what was recorded.
const PLACE: u64 = 30 << 20;

/// A machine's memory with a kernel, and its port.
struct Machine {
    memory: GuestMemory,
    port: TextPort,
}

impl Machine {
    fn new() -> Machine {
        let memory = memory::create(SIZE).unwrap();
        let machine = Machine { port: TextPort::new(memory.clone()), memory };
        machine.write(KERNEL, 1);
        machine
    }

    fn write(&self, range: Range<u64>, byte: u8) {
        let bytes = vec![byte; (range.end - range.start) as usize];
        self.memory.write_slice(&bytes, GuestAddress(range.start)).unwrap();
    }

    fn byte(&self, at: u64) -> u8 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// The kernel changes its text a little, and asks for the rest.
    fn ask(&self, early: u8) -> u32 {
        self.write(TEXT.start + 5..TEXT.start + 6, early);
        for part in [TEXT, INIT] {
            self.port.write(FIRST_PAGE, (part.start / PAGE) as u32);
            self.port.write(PAGES, ((part.end - part.start) / PAGE) as u32);
        }
        self.port.write(HASH, 0x1234_5678);
        self.port.write(HASH, 0x9abc_def0);
        self.port.read(PATCHED)
    }
}

fn recorded() -> RecordedBoot {
    let machine = Machine::new();
    machine.port.record(&KERNEL, INITRAMFS.to_vec());
    assert_eq!(machine.ask(2), 0);
    assert!(machine.port.take_recorded(Vec::new()).is_none(), "it is not patched yet");
    machine.write(TEXT, 3);
    machine.write(INIT, 5);
    machine.port.write(PATCHED, 1);
    machine.write(TEXT.end - 1..TEXT.end, 4);
    let recorded = machine.port.take_recorded(Vec::new()).unwrap();
    let page = |address| address / PAGE..address / PAGE + 1;
    assert_eq!(recorded.record.written, [vec![page(TEXT.start)], vec![page(TEXT.end - 1)]]);
    recorded
}

fn written(recorded: &RecordedBoot) -> File {
    let file = tempfile::tempfile().unwrap();
    recorded.write_to(&file).unwrap();
    file
}

fn shared(recorded: &RecordedBoot) -> SharedBoot {
    SharedBoot::of_any(recorded.record.clone(), written(recorded)).unwrap()
}

fn offered() -> Machine {
    offered_of(&recorded())
}

fn offered_of(recorded: &RecordedBoot) -> Machine {
    let memory = memory::create(SIZE).unwrap();
    let machine = Machine { port: TextPort::new(memory.clone()), memory };
    let shared = shared(recorded);
    shared.load(&machine.memory, PLACE).unwrap();
    machine.port.offer(shared).unwrap();
    machine
}

#[test]
fn what_one_machine_began_with_others_begin_with() {
    let machine = offered();
    for at in [KERNEL.start, TEXT.end - 1, TEXT.end, INIT.start, KERNEL.end - 1] {
        assert_eq!(machine.byte(at), 1, "at {at:x}");
    }
    let end = PLACE + INITRAMFS.len() as u64;
    assert_eq!([PLACE, end - 1, end].map(|at| machine.byte(at)), [9, 9, 0]);
    assert_eq!(shared(&recorded()).kernel(), KERNEL);
}

#[test]
fn what_one_machine_has_patched_others_are_given() {
    for _ in 0..2 {
        let machine = offered();
        assert_eq!(machine.byte(TEXT.start + 5), 1, "as it is loaded");
        assert_eq!(machine.ask(2), 1);
        assert_eq!([machine.byte(TEXT.start + 5), machine.byte(TEXT.end - 1)], [3, 3]);
        assert_eq!([machine.byte(TEXT.start - 1), machine.byte(TEXT.end)], [0, 1]);
        assert_eq!([machine.byte(INIT.start), machine.byte(INIT.end - 1)], [5, 5]);
        assert_eq!([machine.byte(INIT.start - 1), machine.byte(INIT.end)], [1, 1]);
        // It is its own as soon as it writes to it.
        machine.write(TEXT, 4);
        assert_eq!(machine.ask(2), 0, "it asks once");
        assert_eq!(machine.byte(TEXT.start), 4);
    }
}

#[test]
fn a_kernel_whose_text_is_another_one_keeps_it() {
    let machine = offered();
    assert_eq!(machine.ask(7), 0);
    assert_eq!([machine.byte(TEXT.start + 5), machine.byte(TEXT.start + 6)], [7, 1]);
    let machine = offered();
    machine.port.write(PAGES, 1);
    assert_eq!(machine.ask(2), 0, "it has another part");
    let mut other = recorded();
    other.record.hash = 5;
    let machine = offered_of(&other);
    assert_eq!(machine.ask(2), 0, "it would be patched in another way");
}

#[test]
fn who_was_offered_nothing_gets_nothing() {
    let machine = Machine::new();
    assert_eq!(machine.ask(2), 0);
    machine.port.write(PATCHED, 1);
    assert!(machine.port.take_recorded(Vec::new()).is_none());
}

#[test]
fn a_kernel_that_begins_elsewhere_is_not_recorded() {
    let machine = Machine::new();
    machine.port.record(&(KERNEL.start - PAGE..KERNEL.end), INITRAMFS.to_vec());
    machine.ask(2);
    machine.port.write(PATCHED, 1);
    assert!(machine.port.take_recorded(Vec::new()).is_none());
}

/// What is said of a record that was changed, in a file as long as it wants.
fn refusal(change: impl Fn(&mut BootRecord)) -> String {
    let recorded = recorded();
    let mut record = recorded.record.clone();
    change(&mut record);
    let file = written(&recorded);
    let sum = |ranges: &[Range<u64>]| {
        ranges.iter().fold(0_u64, |sum, range| sum.saturating_add(range.end.saturating_sub(range.start)))
    };
    let length = sum(std::slice::from_ref(&record.kernel))
        .saturating_add(sum(&record.parts.0).saturating_mul(2))
        .saturating_add(record.initramfs.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX));
    // What is longer than a file can be stays as it is.
    let _ = file.set_len(length);
    SharedBoot::of_any(record, file).map_or_else(|error| error.to_string(), |_| "it is accepted".to_owned())
}

#[test]
fn what_is_no_boot_of_a_kernel_is_refused() {
    assert_eq!(refusal(|_| ()), "it is accepted");
    assert_eq!(refusal(|record| record.parts.0.truncate(1)), "it is accepted");
    let parts = |parts: &[Range<u64>]| refusal(|record| record.parts = Parts(parts.to_vec()));
    let only = |part: Range<u64>| parts(std::slice::from_ref(&part));
    let backwards = Range { start: INIT.end, end: INIT.start };
    let beyond = KERNEL.end..KERNEL.end + PAGE;
    for (refused, why) in [
        (parts(&[]), "a length that no kernel has"),
        (parts(&[TEXT, INIT.end..INIT.end]), "a length that no kernel has"),
        (parts(&[TEXT, backwards]), "a length that no kernel has"),
        (
            parts(&(0..5).map(|n| TEXT.start + n * PAGE..TEXT.start + (n + 1) * PAGE).collect::<Vec<_>>()),
            "a length",
        ),
        (parts(&[INIT, TEXT]), "another place"),
        (parts(&[TEXT, TEXT]), "another place"),
        (parts(&[TEXT, beyond]), "another place"),
        (only(TEXT.start - PAGE..TEXT.end), "another place"),
        (only(TEXT.start + 1..TEXT.end + 1), "bounds within a page"),
        (only(TEXT.start..TEXT.end - 1), "bounds within a page"),
    ] {
        assert!(refused.contains(why), "{refused} instead of {why}");
    }
    let kernel = |start: u64, end: u64| {
        refusal(|record| (record.kernel, record.entry) = (Range { start, end }, start))
    };
    for (refused, why) in [
        (kernel(KERNEL.start, KERNEL.start), "a length that no kernel has"),
        (kernel(KERNEL.end, KERNEL.start), "a length that no kernel has"),
        (kernel(KERNEL.start, u64::MAX), "a length that no kernel has"),
        (kernel(KERNEL.start - 1, KERNEL.end), "bounds within a page"),
        (kernel(KERNEL.start, KERNEL.end + 1), "bounds within a page"),
        (kernel(0, KERNEL.end), "a place where no kernel can be"),
        (kernel(MAPPED.0 - PAGE, MAPPED.0 + PAGE), "a place where no kernel can be"),
        (refusal(|record| record.entry = KERNEL.end), "a place where no kernel can be"),
        (refusal(|record| record.entry = KERNEL.start - 1), "a place where no kernel can be"),
        (refusal(|record| record.initramfs = u64::MAX), "an initramfs that is too large"),
        (refusal(|record| record.written[1].push(0..1)), "written pages"),
    ] {
        assert!(refused.contains(why), "{refused} instead of {why}");
    }
    let (record, file) = (recorded().record, written(&recorded()));
    file.set_len(file.metadata().unwrap().len() + PAGE).unwrap();
    assert!(
        SharedBoot::of_any(record, file).is_err_and(|error| error.to_string().contains("another length"))
    );
}

#[test]
fn what_is_too_large_is_not_recorded() {
    let machine = Machine::new();
    machine.port.record(&KERNEL, vec![0; MAX_LENGTH as usize + 1]);
    machine.ask(2);
    machine.port.write(PATCHED, 1);
    assert!(machine.port.take_recorded(Vec::new()).is_none());
}

#[test]
fn what_does_not_fit_into_memory_is_told() {
    let shared = shared(&recorded());
    assert!(shared.load(&memory::create(20 << 20).unwrap(), PLACE).is_err());
    assert!(shared.load(&memory::create(SIZE).unwrap(), SIZE).is_err());
}

proptest! {
    #[test]
    fn no_question_harms(
        record: bool,
        accesses in prop::collection::vec((any::<bool>(), 0_u16..PORTS, prop_oneof![any::<u32>(), 0_u32..9000]), 0..16),
    ) {
        let machine = if record { Machine::new() } else { offered() };
        if record {
            machine.port.record(&KERNEL, INITRAMFS.to_vec());
        }
        for (reads, offset, value) in accesses {
            if reads {
                machine.port.read(offset);
            } else {
                machine.port.write(offset, value);
            }
        }
        prop_assert_eq!([TEXT.start, INIT.start, TEXT.end].map(|at| machine.byte(at)), [1; 3]);
    }
}
