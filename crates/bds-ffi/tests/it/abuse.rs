//! Random programs over the C functions in which any handle ever seen is used again.
//!
//! A model knows which handles are ours. Whatever is called: a handle that was released never
//! works again, one that was not never is stale, no number is given out twice, every accepted
//! request has exactly one completion, and at the end nothing is left.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{CString, c_char, c_void};
use std::{env, fs, ptr, thread};

use bds_ffi::backend::{
    bds_backend_attach_device, bds_backend_create, bds_backend_create_on,
    bds_backend_detach_device, bds_backend_eject, bds_backend_insert, bds_backend_node,
    bds_backend_ref, bds_backend_unref,
};
use bds_ffi::bds_status::{
    BDS_ERR_KIND, BDS_ERR_PANIC, BDS_ERR_POISONED, BDS_ERR_STALE, BDS_OK, BDS_STILL_REFERENCED,
};
use bds_ffi::change::{
    bds_change_append, bds_change_clear, bds_change_commit, bds_change_create, bds_change_disown,
    bds_change_insert, bds_change_own, bds_change_remove, bds_change_rename, bds_change_replace,
    bds_change_set_backing, bds_change_unref, bds_change_within,
};
use bds_ffi::context::{bds_context_create, bds_context_ref, bds_context_unref};
use bds_ffi::error::bds_free;
use bds_ffi::event::bds_context_next_event;
use bds_ffi::io::{bds_flush, bds_pread, bds_pwrite};
use bds_ffi::memory::{bds_memory_register, bds_memory_unref};
use bds_ffi::node::{
    bds_graph_child, bds_node_acquire, bds_node_close, bds_node_id, bds_node_open, bds_node_query,
    bds_node_ref, bds_node_unref,
};
use bds_ffi::options::{bds_options_create, bds_options_set_node, bds_options_unref};
use bds_ffi::ptr::{Array, Given, In, Out, Sink, Source, Text};
use bds_ffi::query::bds_query;
use bds_ffi::queue::{
    bds_queue_cancel, bds_queue_create, bds_queue_fd, bds_queue_in_flight, bds_queue_poll,
    bds_queue_submit, bds_queue_unref, bds_queue_wait, bds_queue_wake,
};
use bds_ffi::section::{bds_backend_drain, bds_graph_drain_begin, bds_graph_drain_end};
use bds_ffi::{
    BDS_BACKEND_WRITABLE, bds_backend, bds_backend_options, bds_change, bds_completion,
    bds_context, bds_event, bds_memory, bds_node, bds_opcode, bds_options, bds_queue, bds_request,
    bds_section,
};
use bds_testkit::Chance;

/// Longest time that a request may take.
const PATIENCE_NS: i64 = 60_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Context,
    Node,
    Backend,
    Change,
    Section,
    Queue,
    Memory,
    Options,
}

const KINDS: [Kind; 8] = [
    Kind::Context,
    Kind::Node,
    Kind::Backend,
    Kind::Change,
    Kind::Section,
    Kind::Queue,
    Kind::Memory,
    Kind::Options,
];

/// A program under way.
struct Program {
    chance: Chance,
    /// Every handle ever seen, with its kind and whether it is ours.
    seen: HashMap<u64, (Kind, bool)>,
    order: Vec<u64>,
    /// Requests accepted of each queue that is ours, whose completion was not taken.
    pending: HashMap<u64, HashSet<u64>>,
    buffers: Box<[[u8; 512]]>,
    trace: Vec<String>,
    /// Calls by name: how many worked, how many were refused.
    counts: BTreeMap<&'static str, (u64, u64)>,
}

fn out<T>(place: &mut T) -> Out<T> {
    // SAFETY: a place of ours.
    unsafe { Out::new(place) }
}

fn text(words: &CString) -> Text {
    // SAFETY: a string that outlives the call.
    unsafe { Text::new(words.as_ptr()) }
}

fn is_stale(code: i32) -> bool {
    code == BDS_ERR_STALE as i32 || code == BDS_ERR_KIND as i32
}

impl Program {
    fn new(seed: u64) -> Self {
        Self {
            chance: Chance::new(seed),
            seen: HashMap::new(),
            order: Vec::new(),
            pending: HashMap::new(),
            buffers: vec![[0; 512]; 4].into_boxed_slice(),
            trace: Vec::new(),
            counts: BTreeMap::new(),
        }
    }

    /// Any number: mostly a handle of the kind, sometimes of another one, or none at all.
    fn any(&mut self, kind: Kind) -> u64 {
        match self.chance.below(16) {
            0 => 0,
            1 => self.chance.draw(),
            2 if !self.order.is_empty() => {
                let at = self.chance.below(self.order.len() as u64);
                self.order[usize::try_from(at).unwrap()]
            }
            3 if !self.order.is_empty() => {
                let at = self.chance.below(self.order.len() as u64);
                let bit = self.chance.below(64);
                self.order[usize::try_from(at).unwrap()] ^ (1 << bit)
            }
            _ => {
                let of_kind: Vec<u64> =
                    self.order.iter().copied().filter(|raw| self.seen[raw].0 == kind).collect();
                match of_kind.len() {
                    0 => 0,
                    len => {
                        // The newest ones are ours more often.
                        let back = self.chance.below(8).min(len as u64 - 1);
                        of_kind[len - 1 - usize::try_from(back).unwrap()]
                    }
                }
            }
        }
    }

    fn is_ours(&self, kind: Kind, raw: u64) -> bool {
        self.seen.get(&raw) == Some(&(kind, true))
    }

    fn ours(&self, kind: Kind) -> Vec<u64> {
        self.order.iter().copied().filter(|raw| self.seen[raw] == (kind, true)).collect()
    }

    fn note(&mut self, words: String) {
        self.trace.push(words);
    }

    /// What must hold after every call with these handles.
    fn check(&mut self, name: &'static str, handles: &[(Kind, u64)], code: i32) -> bool {
        self.note(format!("{name}({handles:x?}) = {code}"));
        assert_ne!(code, BDS_ERR_PANIC as i32, "{:#?}", self.trace);
        let all_ours = handles.iter().all(|(kind, raw)| self.is_ours(*kind, *raw));
        assert!(code != BDS_ERR_POISONED as i32, "{:#?}", self.trace);
        if all_ours {
            // Changes name nodes that may have ended meanwhile.
            assert!(!is_stale(code) || name == "commit", "{name}: {:#?}", self.trace);
        } else {
            assert!(code < 0, "{name} worked with a handle that is not ours: {:#?}", self.trace);
        }
        let (worked, refused) = self.counts.entry(name).or_default();
        *(if code >= 0 { worked } else { refused }) += 1;
        code >= 0
    }

    fn made(&mut self, kind: Kind, raw: u64) {
        let before = self.seen.insert(raw, (kind, true));
        assert_eq!(before, None, "a handle was given out twice: {:#?}", self.trace);
        self.order.push(raw);
    }

    fn released(&mut self, raw: u64) {
        self.seen.get_mut(&raw).unwrap().1 = false;
    }

    fn has_section(&self) -> bool {
        !self.ours(Kind::Section).is_empty()
    }

    fn open(&mut self) {
        let context = self.any(Kind::Context);
        let names = ["", ",node-name=a", ",node-name=b"];
        let name = names[usize::try_from(self.chance.below(3)).unwrap()];
        let words = match self.chance.below(4) {
            0 => format!("driver=raw,file=a{name}"),
            1 => format!("driver=copy-on-read,file=b{name}"),
            _ => format!("driver=mem,size=64k{name}"),
        };
        let words = CString::new(words).unwrap();
        let mut node = bds_node::default();
        let code = bds_node_open(bds_context { raw: context }, text(&words), out(&mut node));
        if self.check("open", &[(Kind::Context, context)], code) {
            self.made(Kind::Node, node.raw);
        }
    }

    fn reference(&mut self) {
        let raw = self.any(Kind::Node);
        let mut node = bds_node::default();
        let code = bds_node_ref(bds_node { raw }, out(&mut node));
        if self.check("ref", &[(Kind::Node, raw)], code) {
            self.made(Kind::Node, node.raw);
        }
    }

    fn acquire(&mut self) {
        let (context, raw) = (self.any(Kind::Context), self.any(Kind::Node));
        let mut id = 0;
        let code = bds_node_id(bds_node { raw }, out(&mut id));
        if !self.check("id", &[(Kind::Node, raw)], code) {
            return;
        }
        let mut node = bds_node::default();
        let code = bds_node_acquire(bds_context { raw: context }, id, out(&mut node));
        self.note(format!("acquire({id:x}) = {code}"));
        if code >= 0 {
            assert!(self.is_ours(Kind::Context, context), "{:#?}", self.trace);
            self.made(Kind::Node, node.raw);
        }
    }

    fn release(&mut self, kind: Kind, raw: u64) {
        let code = match kind {
            Kind::Context => bds_context_unref(bds_context { raw }),
            Kind::Node => bds_node_unref(bds_node { raw }),
            Kind::Backend => bds_backend_unref(bds_backend { raw }),
            Kind::Change => bds_change_unref(bds_change { raw }),
            Kind::Section => bds_graph_drain_end(bds_section { raw }),
            Kind::Queue => bds_queue_unref(bds_queue { raw }),
            Kind::Memory => bds_memory_unref(bds_memory { raw }),
            Kind::Options => bds_options_unref(bds_options { raw }),
        };
        if self.check("unref", &[(kind, raw)], code) {
            assert!(code == BDS_OK as i32 || code == BDS_STILL_REFERENCED as i32);
            self.released(raw);
            self.pending.remove(&raw);
        }
    }

    fn backend(&mut self) {
        let mut options = bds_backend_options {
            struct_size: size_of::<bds_backend_options>(),
            name: ptr::null(),
            permissions: 0,
            shared_permissions: 0,
            on_read_error: 0,
            on_write_error: 0,
            flags: BDS_BACKEND_WRITABLE,
            reserved: 0,
        };
        // SAFETY: a struct of ours.
        let options = unsafe { In::new(&raw mut options) };
        let mut backend = bds_backend::default();
        if self.chance.one_in(3) {
            let raw = self.any(Kind::Context);
            let code = bds_backend_create(bds_context { raw }, options, out(&mut backend));
            if self.check("backend", &[(Kind::Context, raw)], code) {
                self.made(Kind::Backend, backend.raw);
            }
        } else {
            let raw = self.any(Kind::Node);
            let code = bds_backend_create_on(bds_node { raw }, options, out(&mut backend));
            if self.check("backend_on", &[(Kind::Node, raw)], code) {
                self.made(Kind::Backend, backend.raw);
            }
        }
    }

    fn media(&mut self) {
        let backend = self.any(Kind::Backend);
        let handle = bds_backend { raw: backend };
        match self.chance.below(6) {
            0 => {
                let raw = self.any(Kind::Node);
                let code = bds_backend_insert(handle, bds_node { raw });
                self.check("insert", &[(Kind::Backend, backend), (Kind::Node, raw)], code);
            }
            1 => {
                let code = bds_backend_eject(handle);
                self.check("eject", &[(Kind::Backend, backend)], code);
            }
            2 => {
                let mut node = bds_node::default();
                let code = bds_backend_node(handle, out(&mut node));
                if self.check("backend_node", &[(Kind::Backend, backend)], code) {
                    self.made(Kind::Node, node.raw);
                }
            }
            3 => {
                let mut other = bds_backend::default();
                let code = bds_backend_ref(handle, out(&mut other));
                if self.check("backend_ref", &[(Kind::Backend, backend)], code) {
                    self.made(Kind::Backend, other.raw);
                }
            }
            4 => {
                let code = bds_backend_attach_device(handle, text(&c"vda".to_owned()));
                self.check("attach", &[(Kind::Backend, backend)], code);
            }
            _ => {
                let code = bds_backend_detach_device(handle);
                self.check("detach", &[(Kind::Backend, backend)], code);
            }
        }
    }

    fn blocking_io(&mut self) {
        // Requests wait for the end of sections, which this thread would have to end.
        if self.has_section() {
            return;
        }
        let raw = self.any(Kind::Backend);
        let backend = bds_backend { raw };
        let offset = self.chance.below(140) * 512;
        let buffer = self.buffers[0].as_mut_ptr().cast::<c_void>();
        let code = match self.chance.below(3) {
            // SAFETY: 512 bytes of ours.
            0 => bds_pread(backend, unsafe { Sink::new(buffer) }, 512, offset, 0),
            // SAFETY: as above.
            1 => bds_pwrite(backend, unsafe { Source::new(buffer) }, 512, offset, 0),
            _ => bds_flush(backend),
        };
        self.check("io", &[(Kind::Backend, raw)], code);
    }

    fn submit(&mut self) {
        let (queue, raw) = (self.any(Kind::Queue), self.any(Kind::Backend));
        let opcodes = [
            bds_opcode::BDS_OP_READ,
            bds_opcode::BDS_OP_WRITE,
            bds_opcode::BDS_OP_FLUSH,
            bds_opcode::BDS_OP_DISCARD,
            bds_opcode::BDS_OP_WRITE_ZEROES,
        ];
        let opcode = opcodes[usize::try_from(self.chance.below(5)).unwrap()];
        let has_buffer = opcode as u32 <= bds_opcode::BDS_OP_WRITE as u32;
        let at = usize::try_from(self.chance.below(4)).unwrap();
        let mut request = bds_request {
            opcode: opcode as u32,
            flags: 0,
            backend: bds_backend { raw },
            offset: self.chance.below(140) * 512,
            bytes: 512,
            user_data: self.chance.draw(),
            buffer: if has_buffer { self.buffers[at].as_mut_ptr().cast() } else { ptr::null_mut() },
            iov: ptr::null(),
            iovcnt: 0,
            target: bds_backend::default(),
            target_offset: 0,
            memory: bds_memory::default(),
            request_id: 0,
            reserved: [0; 4],
        };
        let mut handles = vec![(Kind::Queue, queue), (Kind::Backend, raw)];
        if has_buffer && self.chance.one_in(3) {
            request.memory.raw = self.any(Kind::Memory);
            if request.memory.raw != 0 {
                handles.push((Kind::Memory, request.memory.raw));
            }
        }
        // SAFETY: one request of ours; its buffer lives until the program ends, and the program
        // ends after all completions.
        let requests = unsafe { Array::new(&raw mut request) };
        let code = bds_queue_submit(bds_queue { raw: queue }, requests, 1);
        if self.check("submit", &handles, code) {
            assert_eq!(code, 1);
            let is_new = self.pending.entry(queue).or_default().insert(request.request_id);
            assert!(is_new, "a request id came twice");
        }
    }

    fn take(&mut self, queue: u64, min: usize) {
        let mut done = [bds_completion {
            user_data: 0,
            request_id: 0,
            status: 0,
            flags: 0,
            value: 0,
            reserved: [0; 4],
        }; 8];
        // SAFETY: eight completions of ours.
        let array = unsafe { Array::new(done.as_mut_ptr()) };
        let handle = bds_queue { raw: queue };
        let code = match min {
            0 => bds_queue_poll(handle, array, 8),
            _ => bds_queue_wait(handle, array, 8, min, PATIENCE_NS),
        };
        if self.check("take", &[(Kind::Queue, queue)], code) {
            for one in &done[..usize::try_from(code).unwrap()] {
                let was_pending = self.pending.entry(queue).or_default().remove(&one.request_id);
                assert!(was_pending, "a completion came twice: {:#?}", self.trace);
            }
        }
    }

    fn queue(&mut self) {
        let raw = self.any(Kind::Queue);
        match self.chance.below(6) {
            0 => {
                let context = self.any(Kind::Context);
                let mut queue = bds_queue::default();
                // SAFETY: NULL is allowed.
                let none = unsafe { In::new(ptr::null()) };
                let code = bds_queue_create(bds_context { raw: context }, none, out(&mut queue));
                if self.check("queue", &[(Kind::Context, context)], code) {
                    self.made(Kind::Queue, queue.raw);
                }
            }
            1 => {
                let ids: Vec<u64> = self.pending.values().flatten().copied().collect();
                let at = self.chance.below(ids.len() as u64 + 1);
                let id = ids.get(usize::try_from(at).unwrap()).copied().unwrap_or(77);
                let code = bds_queue_cancel(bds_queue { raw }, id);
                self.check("cancel", &[(Kind::Queue, raw)], code);
            }
            2 => {
                let code = bds_queue_in_flight(bds_queue { raw });
                if self.check("in_flight", &[(Kind::Queue, raw)], code) {
                    let pending = self.pending.get(&raw).map_or(0, HashSet::len);
                    assert_eq!(usize::try_from(code).unwrap(), pending, "{:#?}", self.trace);
                }
            }
            3 => {
                let code = bds_queue_wake(bds_queue { raw });
                self.check("wake", &[(Kind::Queue, raw)], code);
            }
            4 => {
                let code = bds_queue_fd(bds_queue { raw });
                self.check("fd", &[(Kind::Queue, raw)], code);
            }
            _ => self.take(raw, 0),
        }
    }

    fn section(&mut self) {
        let mut section = bds_section::default();
        if self.chance.one_in(2) {
            let raw = self.any(Kind::Node);
            let code = bds_graph_drain_begin(bds_node { raw }, 0, -1, out(&mut section));
            if self.check("drain", &[(Kind::Node, raw)], code) {
                self.made(Kind::Section, section.raw);
            }
        } else {
            let raw = self.any(Kind::Backend);
            let code = bds_backend_drain(bds_backend { raw }, out(&mut section));
            if self.check("backend_drain", &[(Kind::Backend, raw)], code) {
                self.made(Kind::Section, section.raw);
            }
        }
    }

    fn change(&mut self) {
        let change = self.any(Kind::Change);
        let handle = bds_change { raw: change };
        let (a, b) = (self.any(Kind::Node), self.any(Kind::Node));
        let (one, two) = (bds_node { raw: a }, bds_node { raw: b });
        let both = [(Kind::Change, change), (Kind::Node, a), (Kind::Node, b)];
        let (name, handles, code): (&'static str, &[(Kind, u64)], _) = match self.chance.below(11) {
            0 => ("append", &both, bds_change_append(handle, one, two)),
            1 => ("replace", &both, bds_change_replace(handle, one, two)),
            2 if b != 0 => ("backing", &both, bds_change_set_backing(handle, one, two)),
            3 => ("remove", &both[..2], bds_change_remove(handle, one)),
            4 => {
                let words = c"c".to_owned();
                ("rename", &both[..2], bds_change_rename(handle, one, text(&words)))
            }
            5 => ("own", &both[..2], bds_change_own(handle, one)),
            6 => ("disown", &both[..2], bds_change_disown(handle, one)),
            7 => ("clear", &both[..1], bds_change_clear(handle)),
            8 => {
                let raw = self.any(Kind::Backend);
                let code = bds_change_insert(handle, bds_backend { raw }, one);
                let handles = [(Kind::Change, change), (Kind::Backend, raw), (Kind::Node, a)];
                self.check("change_insert", &handles, code);
                return;
            }
            9 => {
                let raw = self.any(Kind::Section);
                let code = bds_change_within(handle, bds_section { raw });
                self.check("within", &[(Kind::Change, change), (Kind::Section, raw)], code);
                return;
            }
            _ => return self.commit_or_create(),
        };
        self.check(name, handles, code);
    }

    fn commit_or_create(&mut self) {
        if self.chance.one_in(2) {
            let raw = self.any(Kind::Context);
            let mut change = bds_change::default();
            let code = bds_change_create(bds_context { raw }, out(&mut change));
            if self.check("change", &[(Kind::Context, raw)], code) {
                self.made(Kind::Change, change.raw);
            }
            return;
        }
        // The closing of a removed node waits for sections below it.
        if self.has_section() {
            return;
        }
        let raw = self.any(Kind::Change);
        // SAFETY: NULL is allowed.
        let none = unsafe { Out::new(ptr::null_mut()) };
        let code = bds_change_commit(bds_change { raw }, none);
        self.check("commit", &[(Kind::Change, raw)], code);
    }

    fn facts(&mut self) {
        let mut json: *mut c_char = ptr::null_mut();
        let (name, handle, code): (&'static str, _, _) = match self.chance.below(4) {
            0 => {
                let raw = self.any(Kind::Node);
                ("node_query", (Kind::Node, raw), bds_node_query(bds_node { raw }, out(&mut json)))
            }
            1 => {
                let raw = self.any(Kind::Context);
                let words = c"holders".to_owned();
                let code = bds_query(bds_context { raw }, text(&words), out(&mut json));
                ("query", (Kind::Context, raw), code)
            }
            2 => {
                let raw = self.any(Kind::Context);
                let mut event =
                    bds_event { sequence: 0, value: 0, r#type: 0, status: 0, reserved: [0; 5] };
                let code =
                    bds_context_next_event(bds_context { raw }, out(&mut event), out(&mut json));
                ("event", (Kind::Context, raw), code)
            }
            _ => {
                let raw = self.any(Kind::Node);
                let words = c"file".to_owned();
                let mut node = bds_node::default();
                let code = bds_graph_child(bds_node { raw }, text(&words), out(&mut node));
                if code >= 0 {
                    self.made(Kind::Node, node.raw);
                }
                ("child", (Kind::Node, raw), code)
            }
        };
        self.check(name, &[handle], code);
        // SAFETY: NULL, or a string of the library's.
        bds_free(unsafe { Given::new(json.cast()) });
    }

    fn small(&mut self) {
        match self.chance.below(5) {
            0 => {
                let mut memory = bds_memory::default();
                let start = self.buffers.as_mut_ptr().cast::<c_void>();
                // SAFETY: the buffers live until the program ends.
                let code = bds_memory_register(unsafe { Sink::new(start) }, 2048, out(&mut memory));
                assert_eq!(code, 0);
                self.made(Kind::Memory, memory.raw);
            }
            1 => {
                let mut options = bds_options::default();
                assert_eq!(bds_options_create(out(&mut options)), 0);
                self.made(Kind::Options, options.raw);
            }
            2 => {
                let (options, node) = (self.any(Kind::Options), self.any(Kind::Node));
                let words = c"backing".to_owned();
                let code = bds_options_set_node(
                    bds_options { raw: options },
                    text(&words),
                    bds_node { raw: node },
                );
                let handles = [(Kind::Options, options), (Kind::Node, node)];
                self.check("set_node", &handles, code);
            }
            3 => {
                let raw = self.any(Kind::Context);
                let mut context = bds_context::default();
                let code = bds_context_ref(bds_context { raw }, out(&mut context));
                if self.check("context_ref", &[(Kind::Context, raw)], code) {
                    self.made(Kind::Context, context.raw);
                }
            }
            _ => {
                if self.has_section() {
                    return;
                }
                let raw = self.any(Kind::Node);
                // SAFETY: NULL is allowed.
                let none = unsafe { Out::new(ptr::null_mut()) };
                let code = bds_node_close(bds_node { raw }, none);
                self.check("close", &[(Kind::Node, raw)], code);
            }
        }
    }

    fn context(&mut self) {
        let mut context = bds_context::default();
        // SAFETY: NULL is allowed.
        let none = unsafe { In::new(ptr::null()) };
        assert_eq!(bds_context_create(none, out(&mut context)), 0);
        self.made(Kind::Context, context.raw);
    }

    fn step(&mut self) {
        match self.chance.below(20) {
            0..3 => self.open(),
            3 | 4 => self.reference(),
            5 => self.acquire(),
            6 | 7 => {
                let kind = KINDS[usize::try_from(self.chance.below(8)).unwrap()];
                let raw = self.any(kind);
                // A queue in use keeps buffers: the program takes its completions first.
                let is_busy = self.pending.get(&raw).is_some_and(|pending| !pending.is_empty());
                if !(kind == Kind::Queue && is_busy) {
                    self.release(kind, raw);
                }
            }
            8 => self.backend(),
            // What waits for requests would wait for this thread's sections.
            9 | 10 if !self.has_section() => self.media(),
            11 => self.blocking_io(),
            12 | 13 => self.submit(),
            14 => self.queue(),
            15 if self.ours(Kind::Section).len() < 2 => self.section(),
            16 | 17 => self.change(),
            18 => self.facts(),
            _ => self.small(),
        }
    }

    /// Gives everything back: sections first, because requests wait for them.
    fn finish(&mut self) {
        for section in self.ours(Kind::Section) {
            self.release(Kind::Section, section);
        }
        for queue in self.ours(Kind::Queue) {
            while self.pending.get(&queue).is_some_and(|pending| !pending.is_empty()) {
                self.take(queue, 1);
            }
        }
        for kind in [
            Kind::Queue,
            Kind::Memory,
            Kind::Options,
            Kind::Change,
            Kind::Backend,
            Kind::Node,
            Kind::Context,
        ] {
            for raw in self.ours(kind) {
                self.release(kind, raw);
            }
        }
        // Whatever was ever given out is stale.
        for raw in self.order.clone() {
            let kind = self.seen[&raw].0;
            self.release(kind, raw);
        }
    }
}

fn run(seed: u64, steps: usize) -> BTreeMap<&'static str, (u64, u64)> {
    let mut program = Program::new(seed);
    program.note(format!("seed {seed}"));
    program.context();
    for _ in 0..steps {
        program.step();
    }
    program.finish();
    program.counts
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn any_handle_ever_seen_may_be_used_again() {
    let is_full = env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    let programs = if is_full { 1_000_000 } else { 1_500 };
    run(0, 50); // what is made once in a process
    let before = descriptors();
    let mut counts: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for seed in 1..=programs {
        for (name, (worked, refused)) in run(seed, 60) {
            let sum = counts.entry(name).or_default();
            *sum = (sum.0 + worked, sum.1 + refused);
        }
    }
    // The programs do what they are for: every call works, and is refused often.
    for (name, (worked, refused)) in &counts {
        assert!(*worked > 2 && *refused > 20, "{name}: {worked} worked, {refused} refused");
    }
    assert!(counts.len() > 35, "{counts:?}");
    // Nodes close in the background.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while descriptors() > before && std::time::Instant::now() < deadline {
        thread::yield_now();
    }
    assert!(descriptors() <= before, "descriptors are left");
}
