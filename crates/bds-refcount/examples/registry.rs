//! A registry of sessions behind a C-like API: callers hold numbers, and a number that is stale
//! gives an error.
//!
//! Shows handles as `u64`, named holders ("who keeps this open?"), a watch on an object's end, and
//! closing in a reap, outside the release.
//!
//! `cargo run -p bds-refcount --example registry`
#![allow(clippy::print_stdout, reason = "an example that shows what happens")]

use bds_refcount::{Arena, Handle, Holder, Kind, Release, Stale, Strong};

/// What the registry stores.
struct Session {
    user: String,
    bytes_sent: u64,
}

/// Sessions by number. The kind tells the numbers of this registry from those of another one.
struct Registry {
    arena: Arena<Session>,
}

impl Registry {
    fn new() -> Self {
        Self { arena: Arena::new(Kind::new(3)) }
    }

    /// Opens a session. The `Strong` keeps it open; the number may be given to code that cannot be
    /// trusted.
    fn open(&self, user: &str) -> Result<(Strong<Session>, u64), Box<dyn std::error::Error>> {
        let session = self.arena.insert(Session { user: user.to_owned(), bytes_sent: 0 })?;
        let number = session.handle().to_u64();
        Ok((session, number))
    }

    /// Looks a number up, whatever it is.
    fn user(&self, number: u64) -> Result<String, Stale> {
        let session = self.arena.acquire(Handle::from_u64(number))?;
        Ok(session.user.clone())
    }

    /// Closes sessions that have lost their last reference. Releases never do this, so they never
    /// block.
    fn close_dead(&self) -> usize {
        let mut closed = 0;
        for (handle, mut dead) in self.arena.reap() {
            dead.bytes_sent += 1; // exclusive access: flush, report errors
            println!("closed {handle}: session of {} ({} bytes)", dead.user, dead.bytes_sent);
            closed += 1;
        }
        closed
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let registry = Registry::new();
    let (session, number) = registry.open("alice")?;
    println!("user of session {number:#018x}: {}", registry.user(number)?);

    // A second holder, with a name: the answer to "why is it still open?".
    let handle = session.handle();
    let upload = registry.arena.acquire_held(handle, Holder::new("upload", 7))?;
    assert_eq!(session.release(), Release::NotLast);
    for holder in registry.arena.holders(handle) {
        println!("still open because of {holder}");
    }

    let watch = registry.arena.watch(handle);
    assert_eq!(upload.release(), Release::Last);
    assert!(watch.has_fired());
    assert_eq!(registry.user(number), Err(Stale::Dying));
    assert_eq!(registry.close_dead(), 1);

    // The slot is used again, but the old number never leads to the new session.
    let (_bob, next) = registry.open("bob")?;
    assert_ne!(next, number);
    for stale in [number, 0, u64::MAX] {
        println!("session {stale:#018x}: {}", registry.user(stale).expect_err("stale"));
    }
    Ok(())
}
