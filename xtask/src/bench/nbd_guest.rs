//! A guest of qemu-storage-daemon: writes 4-KiB blocks to an NBD export at random offsets, and
//! notes how long each write took. The counterpart of `crates/bds-jobs/examples/jobs/guest.rs`,
//! with the same schedule.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const BLOCK: u32 = 4096;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
/// Names of the parts of a run.
const PHASES: [&str; 3] = ["alone", "during", "pivot"];

/// A guest at work, on two threads: one sends, one receives.
pub(super) struct GuestLoad {
    shared: Arc<Shared>,
    sender: JoinHandle<Result<UnixStream, String>>,
    receiver: JoinHandle<Result<Vec<(u8, f64)>, String>>,
}

struct Shared {
    phase: AtomicU8,
    is_over: AtomicBool,
    /// Writes in flight: when each was due, oldest first, by its number.
    flight: Mutex<VecDeque<(u64, Instant)>>,
    ended: Condvar,
}

impl Shared {
    fn flight(&self) -> std::sync::MutexGuard<'_, VecDeque<(u64, Instant)>> {
        self.flight.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestLoad {
    /// Connects to the export and begins to write: `rate` writes a second by the clock, or as many
    /// as `depth` in flight allow if it is 0.
    pub(super) fn start(
        socket: &Path,
        export: &str,
        rate: u32,
        depth: usize,
    ) -> Result<Self, String> {
        let (stream, len) = connect(socket, export)?;
        let reader = stream.try_clone().map_err(|e| format!("NBD: {e}"))?;
        let shared = Arc::new(Shared {
            phase: AtomicU8::new(0),
            is_over: AtomicBool::new(false),
            flight: Mutex::default(),
            ended: Condvar::new(),
        });
        let (to_send, to_receive) = (Arc::clone(&shared), Arc::clone(&shared));
        let pause = (rate > 0).then(|| Duration::from_secs(1) / rate);
        let blocks = len / u64::from(BLOCK);
        let sender = std::thread::spawn(move || send_all(stream, &to_send, pause, depth, blocks));
        let receiver = std::thread::spawn(move || receive_all(reader, &to_receive));
        Ok(Self { shared, sender, receiver })
    }

    /// From here on the writes count for this part of the run.
    pub(super) fn set_phase(&self, phase: u8) {
        self.shared.phase.store(phase, Ordering::Relaxed);
    }

    /// Ends it, flushes, and reports its writes by part of the run.
    pub(super) fn stop(self) -> Result<Value, String> {
        self.shared.is_over.store(true, Ordering::Relaxed);
        self.shared.ended.notify_all();
        let mut stream = self.sender.join().map_err(|_| "the sender panicked")??;
        send(&mut stream, DISCONNECT, u64::MAX, 0, &[])?;
        let samples = self.receiver.join().map_err(|_| "the receiver panicked")??;
        let mut report = json!({});
        for (phase, name) in (0_u8..).zip(PHASES) {
            let of_phase = samples.iter().filter(|sample| sample.0 == phase);
            let mut took: Vec<f64> = of_phase.map(|sample| sample.1).collect();
            took.sort_by(f64::total_cmp);
            report[name] = percentiles(&took);
        }
        Ok(report)
    }
}

/// Flushes an export.
pub(super) fn flush(socket: &Path, export: &str) -> Result<(), String> {
    let (mut stream, _) = connect(socket, export)?;
    send(&mut stream, FLUSH, 0, 0, &[])?;
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).map_err(|e| format!("NBD: {e}"))?;
    match reply[4..8] {
        [0, 0, 0, 0] => send(&mut stream, DISCONNECT, 0, 0, &[]),
        _ => Err("NBD: the flush failed".into()),
    }
}

/// Connects in the fixed newstyle and takes the export by name; returns its length too.
fn connect(socket: &Path, export: &str) -> Result<(UnixStream, u64), String> {
    const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
    let failed = |e: std::io::Error| format!("NBD: {}: {e}", socket.display());
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).map_err(failed)?;
    if &greeting[..8] != b"NBDMAGIC" || &greeting[8..16] != OPTION_MAGIC {
        return Err("NBD: not a newstyle server".into());
    }
    let name_len = u32::try_from(export.len()).map_err(|e| e.to_string())?;
    let mut words = vec![0, 0, 0, 3];
    words.extend(OPTION_MAGIC);
    words.extend(1_u32.to_be_bytes());
    words.extend(name_len.to_be_bytes());
    words.extend(export.as_bytes());
    stream.write_all(&words).map_err(failed)?;
    let mut answer = [0; 10];
    stream.read_exact(&mut answer).map_err(failed)?;
    let [len @ .., _, _] = answer;
    Ok((stream, u64::from_be_bytes(len)))
}

fn send(
    stream: &mut UnixStream,
    kind: u16,
    number: u64,
    offset: u64,
    data: &[u8],
) -> Result<(), String> {
    let mut words = Vec::with_capacity(28 + data.len());
    words.extend(REQUEST_MAGIC.to_be_bytes());
    words.extend(0_u16.to_be_bytes());
    words.extend(kind.to_be_bytes());
    words.extend(number.to_be_bytes());
    words.extend(offset.to_be_bytes());
    words.extend(u32::try_from(data.len()).map_err(|e| e.to_string())?.to_be_bytes());
    words.extend(data);
    stream.write_all(&words).map_err(|e| format!("NBD: {e}"))
}

/// Sends writes until it is over, and waits for those in flight. By the clock, a write's time
/// begins when it was due.
fn send_all(
    mut stream: UnixStream,
    shared: &Shared,
    pause: Option<Duration>,
    depth: usize,
    blocks: u64,
) -> Result<UnixStream, String> {
    let data = [0x5a; BLOCK as usize];
    let start = Instant::now();
    let mut due = start;
    for number in 0.. {
        if pause.is_some() {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        let mut flight = shared.flight();
        while flight.len() >= depth && !shared.is_over.load(Ordering::Relaxed) {
            let wait = shared.ended.wait_timeout(flight, Duration::from_millis(100));
            flight = wait.unwrap_or_else(PoisonError::into_inner).0;
        }
        if shared.is_over.load(Ordering::Relaxed) {
            break;
        }
        flight.push_back((number, if pause.is_some() { due } else { Instant::now() }));
        drop(flight);
        let offset = random(number) % blocks * u64::from(BLOCK);
        send(&mut stream, WRITE, number, offset, &data)?;
        due += pause.unwrap_or_default();
    }
    let mut flight = shared.flight();
    let limit = Instant::now() + Duration::from_secs(30);
    while !flight.is_empty() && Instant::now() < limit {
        let wait = shared.ended.wait_timeout(flight, Duration::from_millis(100));
        flight = wait.unwrap_or_else(PoisonError::into_inner).0;
    }
    drop(flight);
    Ok(stream)
}

/// Receives until the server closes the connection; returns part of the run and microseconds.
fn receive_all(mut stream: UnixStream, shared: &Shared) -> Result<Vec<(u8, f64)>, String> {
    let mut samples = Vec::new();
    let mut reply = [0; 16];
    while stream.read_exact(&mut reply).is_ok() {
        let now = Instant::now();
        let word = |at: usize| u32::from_be_bytes(std::array::from_fn(|i| reply[at + i]));
        if (word(0), word(4)) != (REPLY_MAGIC, 0) {
            return Err(format!("NBD: a write failed with {}", word(4)));
        }
        let number = u64::from(word(8)) << 32 | u64::from(word(12));
        let mut flight = shared.flight();
        let place = flight.iter().position(|(known, _)| *known == number);
        let Some((_, due)) = place.and_then(|place| flight.remove(place)) else {
            return Err(format!("NBD: a reply to no request: {number}"));
        };
        drop(flight);
        shared.ended.notify_all();
        let took = now.saturating_duration_since(due).as_secs_f64() * 1e6;
        samples.push((shared.phase.load(Ordering::Relaxed), took));
    }
    Ok(samples)
}

/// A number that looks random, of a counter (the finaliser of SplitMix64).
fn random(number: u64) -> u64 {
    let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// Percentiles of sorted microseconds.
fn percentiles(took: &[f64]) -> Value {
    let at = |thousandths: usize| {
        let last = took.len().saturating_sub(1);
        took.get((took.len() * thousandths / 1000).min(last)).copied()
    };
    json!({
        "count": took.len(), "p50": at(500), "p99": at(990), "p999": at(999),
        "max": took.last(),
    })
}
