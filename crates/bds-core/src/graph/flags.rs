//! Options that every node has, and what a child inherits of them.

use crate::driver::{DetectZeroes, DriverType, OpenFlags, Role};
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

/// Takes the common options but `driver` and `node-name`; what is not given stays as in `base`.
pub(super) fn take_flags(options: &mut Options, base: OpenFlags) -> Result<OpenFlags> {
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
            "force-share=on needs read-only=on: without locks somebody else may be writing",
        ));
    }
    Ok(flags)
}

/// What a child of this role starts from.
pub(super) fn inherited(parent: OpenFlags, role: Role) -> OpenFlags {
    let is_backing = role.contains(Role::COW);
    OpenFlags {
        read_only: parent.read_only || is_backing,
        auto_read_only: parent.auto_read_only && !is_backing,
        info_only: parent.info_only,
        for_check: parent.for_check && role.contains(Role::FILTERED),
        force_share: parent.force_share,
        cache: crate::driver::CacheMode { writeback: true, ..parent.cache },
        // Whoever stands above decides what is discarded; what it sends down is meant.
        discard: true,
        detect_zeroes: DetectZeroes::Off,
        role,
    }
}

/// Refuses options that the driver does not know, before anything is opened.
pub(super) fn check_known(driver: &dyn DriverType, options: &Options) -> Result<()> {
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

/// Refuses what the driver did not take although it knows it: it has no meaning together with the rest.
pub(super) fn check_taken(driver: &dyn DriverType, options: &Options) -> Result<()> {
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
