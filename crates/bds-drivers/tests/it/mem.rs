//! Compares a mem disk with a vector of bytes.

use bds_core::driver::{Attempt, Prealloc, Precision, StatusFlags, Truncate, ZeroFlags};
use proptest::prelude::{Strategy, prop_assert_eq, prop_oneof, proptest};
use serde_json::json;

use crate::kit::Fixture;

const LEN: usize = 20_000;

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u8),
    Zero(usize, usize),
    Discard(usize, usize),
    Resize(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..LEN, 1..LEN);
    let step = prop_oneof![
        (range(), 1_u8..).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        range().prop_map(|(at, len)| Step::Zero(at, len)),
        range().prop_map(|(at, len)| Step::Discard(at, len)),
        (1..LEN).prop_map(Step::Resize),
    ];
    proptest::collection::vec(step, 1..12)
}

proptest! {
    #[test]
    fn mem_matches_a_vector_of_bytes(steps in steps()) {
        let fixture = Fixture::new(1);
        let options = json!({"driver": "mem", "size": LEN, "discard": "unmap"});
        let backend = fixture.backend(options).unwrap();
        let mut model = vec![0; LEN];
        for step in steps {
            let cut = |at: usize, len: usize, all: usize| (at.min(all), len.min(all - at.min(all)));
            match step {
                Step::Write(at, len, byte) => {
                    let (at, len) = cut(at, len, model.len());
                    fixture.write(&backend, at as u64, &vec![byte; len]).unwrap();
                    model[at..at + len].fill(byte);
                }
                Step::Zero(at, len) => {
                    let (at, len) = cut(at, len, model.len());
                    let zero = backend.write_zeroes(at as u64, len as u64, ZeroFlags::empty());
                    prop_assert_eq!(fixture.sim.block_on(zero).unwrap(), Attempt::Done);
                    model[at..at + len].fill(0);
                }
                Step::Discard(at, len) => {
                    let (at, len) = cut(at, len, model.len());
                    fixture.sim.block_on(backend.discard(at as u64, len as u64)).unwrap();
                    model[at..at + len].fill(0);
                }
                Step::Resize(len) => {
                    let prealloc = Prealloc::Off;
                    let change = Truncate { len: len as u64, exact: true, prealloc, zero_new: false };
                    fixture.sim.block_on(backend.truncate(change)).unwrap();
                    model.resize(len, 0);
                }
            }
        }
        prop_assert_eq!(backend.len(), model.len() as u64);
        prop_assert_eq!(&fixture.read(&backend, 0, model.len()).unwrap(), &model);
        let mut at = 0;
        while at < model.len() {
            let status = backend.block_status(at as u64, (model.len() - at) as u64, Precision::Exact);
            let run = fixture.sim.block_on(status).unwrap();
            let end = at + run.len as usize;
            if run.flags.contains(StatusFlags::ZERO) {
                prop_assert_eq!(model[at..end].iter().position(|b| *b != 0), None);
            }
            at = end;
        }
    }
}
