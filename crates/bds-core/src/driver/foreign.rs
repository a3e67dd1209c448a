//! Recognises image formats that no driver here reads, so that such files are not taken for raw
//! disks.
//!
//! By the magic numbers of their specifications, at the beginning or end of the file. A raw disk
//! may hold such bytes too, because a guest writes what it likes: a user that knows better names
//! the format.

/// How many trailing bytes of a file are examined.
pub const TAIL_LEN: usize = 512;

/// Magic numbers at a fixed offset from the beginning.
const AT_BEGIN: &[(usize, &[u8], &str)] = &[
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd (vpc)"),
    (0, b"QED\0", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"\x3a\xff\x26\xed", "Android sparse image"),
    (0, b"sprs", "Apple sparse image"),
    (0, b"EVF\x09\x0d\x0a\xff\0", "EWF (E01)"),
    (0, b"\xfd7zXZ\0", "xz-compressed file"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed file"),
];

/// Magic numbers at an offset from the end.
const AT_END: &[(usize, &[u8], &str)] = &[
    (512, b"conectix", "vhd (vpc)"),
    // The first versions of Virtual PC wrote one byte less.
    (511, b"conectix", "vhd (vpc)"),
    (512, b"koly", "dmg"),
];

/// The format of a file with these first and last bytes; `None` if it may be a raw disk.
pub fn foreign_format(head: &[u8], tail: &[u8]) -> Option<&'static str> {
    let begins = |(offset, mark, _): &&(usize, &[u8], &str)| {
        head.get(*offset..).is_some_and(|rest| rest.starts_with(mark))
    };
    let ends = |(from_end, mark, _): &&(usize, &[u8], &str)| {
        let begin = tail.len().checked_sub(*from_end);
        begin.is_some_and(|begin| tail[begin..].starts_with(mark))
    };
    let marked = AT_BEGIN.iter().find(begins).or_else(|| AT_END.iter().find(ends));
    if let Some((_, _, name)) = marked {
        return Some(name);
    }
    if head.starts_with(b"QFI\xfb") {
        return Some(if head.get(4..8) == Some(&[0, 0, 0, 1]) {
            "qcow (version 1)"
        } else {
            "qcow"
        });
    }
    if is_vmdk_descriptor(head) {
        return Some("vmdk");
    }
    compressed(head)
}

/// Magic numbers of three bytes are checked together with the bytes that must follow.
fn compressed(head: &[u8]) -> Option<&'static str> {
    match head {
        [0x1f, 0x8b, 8, flags, ..] if *flags < 0x20 => Some("gzip-compressed file"),
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, ..] => {
            Some("bzip2-compressed file")
        }
        _ => None,
    }
}

/// A VMDK descriptor is text: comments and empty lines, then its version.
fn is_vmdk_descriptor(head: &[u8]) -> bool {
    const TITLE: &[u8] = b"# Disk DescriptorFile";
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    if head.get(..TITLE.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(TITLE)) {
        return true;
    }
    let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"));
    let Some(first) = first.filter(|line| line.len() < 64) else { return false };
    let first: Vec<u8> = first.iter().copied().filter(|byte| *byte != b' ').collect();
    matches!(first.to_ascii_lowercase().as_slice(), b"version=1" | b"version=2" | b"version=3")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_by_table() {
        let at = |offset: usize, mark: &[u8]| {
            let mut bytes = vec![0; offset];
            bytes.extend_from_slice(mark);
            bytes.resize(bytes.len().max(4096), 0);
            bytes
        };
        for (head, name) in [
            (at(0, b"KDMV\x01"), Some("vmdk")),
            (at(64, b"\x7f\x10\xda\xbe"), Some("vdi")),
            (at(63, b"\x7f\x10\xda\xbe"), None),
            (at(0, b"QFI\xfb\0\0\0\x01"), Some("qcow (version 1)")),
            (at(0, b"QFI\xfb\0\0\0\x09"), Some("qcow")),
            (at(0, b"# disk descriptorfile\r\nversion=1\r\n"), Some("vmdk")),
            (at(0, b"\n# made by hand\n\nversion = 1\ncreateType=\"x\"\n"), Some("vmdk")),
            (at(0, b"# a script\nversion=4\n"), None),
            (at(0, b"version=1"), None),
            (at(0, b"\x1f\x8b\x08\x00"), Some("gzip-compressed file")),
            (at(0, b"\x1f\x8b\x08\xff"), None),
            (at(0, b"BZh91AY&SY"), Some("bzip2-compressed file")),
            (at(0, b"BZh9 is not enough"), None),
            (at(1, b"vhdxfile"), None),
            (at(0, b""), None),
        ] {
            assert_eq!(foreign_format(&head, &[0; TAIL_LEN]), name, "{:?}", &head[..40]);
        }
        assert_eq!(foreign_format(b"QED", b"QED"), None, "shorter than its mark");
        assert_eq!(foreign_format(b"", b""), None);
    }

    #[test]
    fn marks_at_the_end_by_table() {
        for (len, mark, from_end, name) in [
            (512, b"conectix".as_slice(), 512, Some("vhd (vpc)")),
            (512, b"conectix", 511, Some("vhd (vpc)")),
            (512, b"conectix", 510, None),
            (512, b"koly", 512, Some("dmg")),
            (511, b"conectix", 511, Some("vhd (vpc)")),
            (100, b"koly", 100, None),
        ] {
            let mut tail = vec![0; len];
            tail[len - from_end..][..mark.len()].copy_from_slice(mark);
            assert_eq!(foreign_format(&[0; 4096], &tail), name, "{mark:?} {from_end}");
        }
    }
}
