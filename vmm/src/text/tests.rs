use proptest::prelude::*;

use super::*;
use crate::memory;

const SIZE: u64 = 32 << 20;
const IMAGE: Range<u64> = 16 << 20..24 << 20;
const TEXT: Range<u64> = 17 << 20..19 << 20;
/// Freed after the start.
const INIT: Range<u64> = (20 << 20) + PAGE..(20 << 20) + 8 * PAGE;

/// A machine's memory with a kernel, and its port.
struct Machine {
    memory: GuestMemory,
    port: TextPort,
}

impl Machine {
    fn new() -> Machine {
        let memory = memory::create(SIZE).unwrap();
        let machine = Machine { port: TextPort::new(memory.clone()), memory };
        machine.write(IMAGE, 1);
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

fn recorded() -> RecordedText {
    let machine = Machine::new();
    machine.port.record(&IMAGE);
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

fn shared(recorded: &RecordedText) -> SharedText {
    let file = tempfile::tempfile().unwrap();
    recorded.write_to(&file).unwrap();
    SharedText::of_any(recorded.record.clone(), file).unwrap()
}

fn offered() -> Machine {
    let machine = Machine::new();
    let shared = shared(&recorded());
    shared.load(&machine.memory, &IMAGE).unwrap();
    machine.port.offer(shared).unwrap();
    machine
}

#[test]
fn what_one_machine_has_patched_others_are_given() {
    for _ in 0..2 {
        let machine = offered();
        assert_eq!(machine.byte(TEXT.start + 5), 1, "as it is loaded");
        assert_eq!(machine.ask(2), 1);
        assert_eq!([machine.byte(TEXT.start + 5), machine.byte(TEXT.end - 1)], [3, 3]);
        assert_eq!([machine.byte(TEXT.start - 1), machine.byte(TEXT.end)], [1, 1]);
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
    let machine = offered();
    if let Offer::Text { shared, .. } = &mut machine.port.state().offer {
        shared.record.hash = 5;
    }
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
fn what_is_no_text_of_a_kernel_is_refused() {
    let RecordedText { record, versions } = recorded();
    let refused = |parts: &[Range<u64>]| {
        let file = tempfile::tempfile().unwrap();
        RecordedText { record: record.clone(), versions: versions.clone() }.write_to(&file).unwrap();
        let parts = Parts(parts.to_vec());
        SharedText::of_any(TextRecord { parts, ..record.clone() }, file).is_err()
    };
    assert!(!refused(&[TEXT, INIT]) && !refused(&[INIT, TEXT]));
    for parts in [
        &[TEXT][..],
        &[],
        &[TEXT, INIT, TEXT],
        &[TEXT.start + 1..TEXT.end, INIT],
        &[TEXT.start..TEXT.end - 1, INIT],
        &[TEXT, Range { start: INIT.end, end: INIT.start }],
        &[TEXT, INIT, INIT.start..INIT.start],
        &[0..u64::MAX - PAGE + 1, INIT],
        &[0..PAGE, 0..PAGE, 0..PAGE, 0..PAGE, 0..PAGE],
    ] {
        assert!(refused(parts), "{parts:?}");
    }
    let beyond = IMAGE.start..TEXT.end - PAGE;
    let memory = memory::create(SIZE).unwrap();
    assert!(shared(&recorded()).load(&memory, &beyond).is_err());
}

proptest! {
    #[test]
    fn no_question_harms(
        record: bool,
        accesses in prop::collection::vec((any::<bool>(), 0_u16..PORTS, prop_oneof![any::<u32>(), 0_u32..9000]), 0..16),
    ) {
        let machine = if record { Machine::new() } else { offered() };
        if record {
            machine.port.record(&IMAGE);
        }
        for (reads, offset, value) in accesses {
            if reads {
                machine.port.read(offset);
            } else {
                machine.port.write(offset, value);
            }
        }
        prop_assert_eq!(machine.byte(TEXT.end), 1);
    }
}
