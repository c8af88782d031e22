//! The global descriptor table, and the segment registers that go with it.
//!
//! In 64-bit mode segments have no base and no limit any more, but the boot protocol still asks for flat ones, with
//! code at selector 0x10 and data at 0x18.

use kvm_bindings::kvm_segment;

/// A segment as the boot protocol wants it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment {
    selector: u16,
    /// Access byte and flags, as in bits 40 to 55 of a descriptor.
    flags: u16,
    limit: u32,
}

/// The segments of the boot processor.
pub(crate) struct Segments {
    pub(crate) code: Segment,
    pub(crate) data: Segment,
    pub(crate) task: Segment,
}

/// All segments.
pub(crate) const TABLE: Segments = Segments {
    // Present, code, execute and read, accessed; granularity of 4 KiB, 64-bit.
    code: Segment { selector: 0x10, flags: 0xa09b, limit: 0xf_ffff },
    // Present, data, read and write, accessed; granularity of 4 KiB, 32-bit.
    data: Segment { selector: 0x18, flags: 0xc093, limit: 0xf_ffff },
    // Present, busy task state segment.
    task: Segment { selector: 0x20, flags: 0x008b, limit: 0xffff },
};

/// Entries of the table: null and one unused, then the three segments.
const ENTRIES: usize = 5;
/// What the limit field of the table's register has to hold.
pub(crate) const LIMIT: u16 = (ENTRIES * size_of::<u64>() - 1) as u16;

impl Segment {
    /// The descriptor (Intel SDM, volume 3, section 3.4.5). The base is 0.
    fn descriptor(self) -> u64 {
        let limit = u64::from(self.limit);
        let flags = u64::from(self.flags);
        (limit & 0xffff) | (limit & 0xf_0000) << 32 | (flags & 0xf0ff) << 40
    }

    /// The same as KVM wants it.
    pub(crate) fn register(self) -> kvm_segment {
        let bit = |position: u16| (self.flags >> position & 1) as u8;
        let granular = bit(15);
        kvm_segment {
            base: 0,
            limit: if granular == 1 { self.limit << 12 | 0xfff } else { self.limit },
            selector: self.selector,
            type_: (self.flags & 0xf) as u8,
            s: bit(4),
            dpl: (self.flags >> 5 & 3) as u8,
            present: bit(7),
            avl: bit(12),
            l: bit(13),
            db: bit(14),
            g: granular,
            ..Default::default()
        }
    }
}

/// The table as the processor reads it.
pub(super) fn bytes() -> Vec<u8> {
    let mut table = [0_u64; ENTRIES];
    for segment in [TABLE.code, TABLE.data, TABLE.task] {
        table[usize::from(segment.selector) / size_of::<u64>()] = segment.descriptor();
    }
    table.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        let bytes = bytes();
        let entry = |index: usize| u64::from_le_bytes(bytes[index * 8..][..8].try_into().unwrap());
        assert_eq!([entry(0), entry(1)], [0, 0]);
        assert_eq!(entry(2), 0x00af_9b00_0000_ffff);
        assert_eq!(entry(3), 0x00cf_9300_0000_ffff);
        assert_eq!(entry(4), 0x0000_8b00_0000_ffff);
        assert_eq!(bytes.len() - 1, usize::from(LIMIT));
    }

    #[test]
    fn registers_say_the_same_as_descriptors() {
        let code = TABLE.code.register();
        assert_eq!((code.type_, code.s, code.present, code.l, code.db, code.g), (0xb, 1, 1, 1, 0, 1));
        assert_eq!((code.limit, code.base, code.dpl), (u32::MAX, 0, 0));
        let task = TABLE.task.register();
        assert_eq!((task.type_, task.s, task.present, task.g, task.limit), (0xb, 0, 1, 0, 0xffff));
    }
}
