//! Common node options (`read-only`, `cache.*`, `discard`, ...): parsing, storage, and inheritance
//! by children.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::driver::{CacheMode, DetectZeroes, DriverType, OpenFlags, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::options::{OptionKind, OptionSpec, Options};

/// The common options, for help texts and for the check of unknown keys.
pub const COMMON_OPTIONS: &[OptionSpec] = &[
    spec("driver", OptionKind::String, "which driver", None),
    spec("node-name", OptionKind::String, "the node's name", None),
    spec("read-only", OptionKind::Bool, "never write", Some("off")),
    spec(
        "auto-read-only",
        OptionKind::Bool,
        "read-only will do where the host allows no more",
        Some("off"),
    ),
    spec("cache.direct", OptionKind::Bool, "bypass the host's page cache", Some("off")),
    spec("cache.no-flush", OptionKind::Bool, "ignore flushes", Some("off")),
    spec(
        "cache.writeback",
        OptionKind::Bool,
        "complete writes before they are durable",
        Some("on"),
    ),
    spec(
        "discard",
        OptionKind::Choice(&["ignore", "unmap", "off", "on"]),
        "what becomes of discards",
        Some("ignore"),
    ),
    spec(
        "detect-zeroes",
        OptionKind::Choice(&["off", "on", "unmap"]),
        "make writes of zeros zero writes",
        Some("off"),
    ),
    spec("force-share", OptionKind::Bool, "take no locks against others", Some("off")),
];

const fn spec(
    name: &'static str,
    kind: OptionKind,
    help: &'static str,
    default: Option<&'static str>,
) -> OptionSpec {
    OptionSpec { name, kind, help, default }
}

bitflags::bitflags! {
    /// A node's flags as bits; and which of them were given for the node itself.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Given: u32 {
        const READ_ONLY = 1;
        const AUTO_READ_ONLY = 1 << 1;
        const INFO_ONLY = 1 << 2;
        const FOR_CHECK = 1 << 3;
        const FORCE_SHARE = 1 << 4;
        const DIRECT = 1 << 5;
        const NO_FLUSH = 1 << 6;
        const WRITEBACK = 1 << 7;
        const DISCARD = 1 << 8;
        const DETECT_ZEROES = 1 << 9;
        const DETECT_UNMAP = 1 << 10;
        const IMPLICIT = 1 << 11;
        const REFUSE_WRITERS = 1 << 12;
    }
}

impl Given {
    const BY_OPTION: [(&'static str, Self); 8] = [
        ("read-only", Self::READ_ONLY),
        ("auto-read-only", Self::AUTO_READ_ONLY),
        ("cache.direct", Self::DIRECT),
        ("cache.no-flush", Self::NO_FLUSH),
        ("cache.writeback", Self::WRITEBACK),
        ("force-share", Self::FORCE_SHARE),
        ("discard", Self::DISCARD),
        ("detect-zeroes", Self::DETECT_ZEROES),
    ];

    /// Which common options are given here.
    pub(in crate::graph) fn of(options: &Options) -> Self {
        let given = Self::BY_OPTION.iter().filter(|(key, _)| options.contains(key));
        given.fold(Self::empty(), |all, (_, bit)| all | *bit)
    }
}

/// A node's flags, read by every request, changed by reopening.
pub(in crate::graph) struct FlagsCell(AtomicU32);

/// Bits of the role lie above those of the flags.
const ROLE_SHIFT: u32 = 16;

impl FlagsCell {
    pub(in crate::graph) fn new(flags: OpenFlags) -> Self {
        let cell = Self(AtomicU32::new(0));
        cell.store(flags);
        cell
    }

    #[inline]
    pub(in crate::graph) fn is_read_only(&self) -> bool {
        self.0.load(Ordering::Relaxed) & Given::READ_ONLY.bits() != 0
    }

    #[inline]
    pub(in crate::graph) fn load(&self) -> OpenFlags {
        let bits = self.0.load(Ordering::Relaxed);
        let has = |bit: Given| bits & bit.bits() != 0;
        OpenFlags {
            read_only: has(Given::READ_ONLY),
            auto_read_only: has(Given::AUTO_READ_ONLY),
            info_only: has(Given::INFO_ONLY),
            for_check: has(Given::FOR_CHECK),
            force_share: has(Given::FORCE_SHARE),
            refuse_writers: has(Given::REFUSE_WRITERS),
            cache: CacheMode {
                direct: has(Given::DIRECT),
                no_flush: has(Given::NO_FLUSH),
                writeback: has(Given::WRITEBACK),
            },
            discard: has(Given::DISCARD),
            detect_zeroes: match (has(Given::DETECT_ZEROES), has(Given::DETECT_UNMAP)) {
                (false, _) => DetectZeroes::Off,
                (true, false) => DetectZeroes::On,
                (true, true) => DetectZeroes::Unmap,
            },
            is_implicit: has(Given::IMPLICIT),
            role: Role::from_bits_truncate(bits >> ROLE_SHIFT),
        }
    }

    pub(in crate::graph) fn store(&self, flags: OpenFlags) {
        let detects = flags.detect_zeroes != DetectZeroes::Off;
        let bits = [
            (flags.read_only, Given::READ_ONLY),
            (flags.auto_read_only, Given::AUTO_READ_ONLY),
            (flags.info_only, Given::INFO_ONLY),
            (flags.for_check, Given::FOR_CHECK),
            (flags.force_share, Given::FORCE_SHARE),
            (flags.cache.direct, Given::DIRECT),
            (flags.cache.no_flush, Given::NO_FLUSH),
            (flags.cache.writeback, Given::WRITEBACK),
            (flags.discard, Given::DISCARD),
            (detects, Given::DETECT_ZEROES),
            (flags.detect_zeroes == DetectZeroes::Unmap, Given::DETECT_UNMAP),
            (flags.is_implicit, Given::IMPLICIT),
            (flags.refuse_writers, Given::REFUSE_WRITERS),
        ];
        let set = bits.iter().filter(|(is_set, _)| *is_set).map(|(_, bit)| *bit);
        let bits = set.fold(Given::empty(), |all, bit| all | bit).bits();
        self.0.store(bits | flags.role.bits() << ROLE_SHIFT, Ordering::Relaxed);
    }
}

/// The flags of a child of this role after its parent's flags have changed; what was given for the
/// child itself stays.
pub(in crate::graph) fn inherited_again(
    now: OpenFlags,
    given: Given,
    parent: OpenFlags,
    role: Role,
) -> OpenFlags {
    let fresh = inherited(parent, role);
    let keep = |bit: Given| given.contains(bit);
    OpenFlags {
        read_only: if keep(Given::READ_ONLY) { now.read_only } else { fresh.read_only },
        auto_read_only: if keep(Given::AUTO_READ_ONLY) {
            now.auto_read_only
        } else {
            fresh.auto_read_only
        },
        force_share: if keep(Given::FORCE_SHARE) { now.force_share } else { fresh.force_share },
        cache: CacheMode {
            direct: if keep(Given::DIRECT) { now.cache.direct } else { fresh.cache.direct },
            no_flush: if keep(Given::NO_FLUSH) { now.cache.no_flush } else { fresh.cache.no_flush },
            writeback: now.cache.writeback,
        },
        ..now
    }
}

/// Takes the common options but `driver` and `node-name`; what is not given stays as in `base`.
pub(in crate::graph) fn take_flags(options: &mut Options, base: OpenFlags) -> Result<OpenFlags> {
    let mut flags = base;
    let switch = |options: &mut Options, key, slot: &mut bool| -> Result<()> {
        if let Some(value) = options.take_bool(key)? {
            *slot = value;
        }
        Ok(())
    };
    switch(options, "read-only", &mut flags.read_only)?;
    switch(options, "auto-read-only", &mut flags.auto_read_only)?;
    switch(options, "cache.direct", &mut flags.cache.direct)?;
    switch(options, "cache.no-flush", &mut flags.cache.no_flush)?;
    switch(options, "cache.writeback", &mut flags.cache.writeback)?;
    switch(options, "force-share", &mut flags.force_share)?;
    let discard = [("unmap", true), ("on", true), ("ignore", false), ("off", false)];
    if let Some(value) = options.take_choice("discard", &discard)? {
        flags.discard = value;
    }
    let detect =
        [("off", DetectZeroes::Off), ("on", DetectZeroes::On), ("unmap", DetectZeroes::Unmap)];
    if let Some(value) = options.take_choice("detect-zeroes", &detect)? {
        flags.detect_zeroes = value;
    }
    if flags.detect_zeroes == DetectZeroes::Unmap && !flags.discard {
        return Err(Error::new(ErrorKind::InvalidInput, "detect-zeroes=unmap needs discard=unmap"));
    }
    if flags.force_share && !flags.read_only {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "force-share=on needs read-only=on: without locks another process may be writing",
        ));
    }
    Ok(flags)
}

/// The flags that a child of this role inherits when it is opened.
pub(in crate::graph) fn inherited(parent: OpenFlags, role: Role) -> OpenFlags {
    let is_backing = role.contains(Role::COW);
    OpenFlags {
        read_only: parent.read_only || is_backing,
        auto_read_only: parent.auto_read_only && !is_backing,
        info_only: parent.info_only,
        for_check: parent.for_check && role.contains(Role::FILTERED),
        force_share: parent.force_share,
        refuse_writers: parent.refuse_writers,
        cache: crate::driver::CacheMode { writeback: true, ..parent.cache },
        // The parent has decided what is discarded: a discard that arrives is to be done.
        discard: true,
        detect_zeroes: DetectZeroes::Off,
        is_implicit: false,
        role,
    }
}

/// Refuses options that the driver does not know, before anything is opened.
pub(in crate::graph) fn check_known(driver: &dyn DriverType, options: &Options) -> Result<()> {
    let is_known = |key: &str| {
        let belongs = |spec: &OptionSpec| {
            spec.name == key || spec.name.split_once('.').is_some_and(|(group, _)| group == key)
        };
        driver.open_options().iter().any(belongs)
    };
    match options.keys().find(|key| !is_known(key)) {
        Some(key) => Err(unknown(driver, key)),
        None => Ok(()),
    }
}

/// Refuses known options that the driver did not take: they have no meaning together with the rest.
pub(in crate::graph) fn check_taken(driver: &dyn DriverType, options: &Options) -> Result<()> {
    match options.keys().next() {
        Some(key) => Err(unknown(driver, key)),
        None => Ok(()),
    }
}

fn unknown(driver: &dyn DriverType, key: &str) -> Error {
    let known: Vec<&str> = driver.open_options().iter().map(|spec| spec.name).collect();
    let name = driver.name();
    let known = if known.is_empty() { "no options".to_owned() } else { known.join(", ") };
    Error::new(
        ErrorKind::InvalidInput,
        format!("driver '{name}' does not know the option '{key}' here (it knows: {known})"),
    )
}
