//! Random requests over random limits against a plain vector of bytes.

use proptest::prelude::{Just, Strategy, any, prop, prop_oneof, proptest};

use crate::driver::{Limits, WriteFlags, ZeroFlags};
use crate::options::Options;
use crate::test_kit::disk::{Config, DiskGraph};
use crate::test_kit::{iov, run};

const LEN: usize = 40_000;

#[derive(Clone, Debug)]
enum Step {
    Read(usize, usize, usize),
    Write(usize, usize, usize, u8, bool),
    Zero(usize, usize),
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    let place = (0..LEN).prop_flat_map(|at| (Just(at), 0..=(LEN - at).min(12_000)));
    prop_oneof![
        (place.clone(), 1..9usize).prop_map(|((at, len), parts)| Step::Read(at, len, parts)),
        (place.clone(), 1..9usize, any::<u8>(), any::<bool>())
            .prop_map(|((at, len), parts, byte, fua)| Step::Write(at, len, parts, byte, fua)),
        place.prop_map(|(at, len)| Step::Zero(at, len)),
        Just(Step::Flush),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    let max = prop_oneof![Just(0u64), 1..20_000u64];
    (0..13u32, max, 0..5u32, 0..14u32).prop_map(|(shift, max_transfer, max_iov, zero_shift)| {
        let request_alignment = 1 << shift;
        Limits {
            request_alignment,
            max_transfer,
            max_iov,
            zero_alignment: 1 << zero_shift,
            ..Limits::default()
        }
    })
}

proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(150))]

    #[test]
    fn requests_match_a_vector_of_bytes(
        limits in limits(),
        inline in any::<bool>(),
        can_zero in any::<bool>(),
        detects in any::<bool>(),
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let word = if detects { "unmap" } else { "off" };
        let config = Config {
            limits,
            inline,
            zero_flags: can_zero.then_some(ZeroFlags::FUA),
            options: Options::new().with("detect-zeroes", word).with("discard", "unmap"),
            ..Config::default()
        };
        run(1, async {
            let mut model: Vec<u8> = (0..LEN).map(|i| u8::try_from(i % 251).unwrap()).collect();
            // A node's last block is a whole one here: only files end inside a block.
            let (disk, state) = DiskGraph::new().disk(model.clone(), config).await;
            for step in &steps {
                match *step {
                    Step::Read(at, len, parts) => {
                        let buffer = iov(&vec![0xEE; len], parts);
                        disk.read(at as u64, buffer.clone()).await.unwrap();
                        assert_eq!(buffer.to_vec(0..len), model[at..at + len]);
                    }
                    Step::Write(at, len, parts, byte, fua) => {
                        let data: Vec<u8> = if byte % 4 == 0 {
                            vec![0; len]
                        } else {
                            (0..len).map(|i| byte.wrapping_add(u8::try_from(i % 256).unwrap())).collect()
                        };
                        model[at..at + len].copy_from_slice(&data);
                        let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
                        disk.write(at as u64, iov(&data, parts), flags).await.unwrap();
                    }
                    Step::Zero(at, len) => {
                        model[at..at + len].fill(0);
                        let flags = ZeroFlags::MAY_UNMAP;
                        let _ = disk.write_zeroes(at as u64, len as u64, flags).await.unwrap();
                    }
                    Step::Flush => disk.flush().await.unwrap(),
                }
            }
            assert_eq!(state.bytes()[..LEN], model);
        });
    }
}
