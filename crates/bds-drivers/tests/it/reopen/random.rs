//! Random requests between random changes of mode, options and activity, compared with a list of
//! bytes.

use bds_core::Options;
use bds_core::driver::{Attempt, ZeroFlags};
use bds_io::{Buf, Sim, SimConfig};
use bds_testkit::{Chance, Scratch, pattern, qemu_img};
use serde_json::json;

use super::driver_stack::{Image, read_only, writer};
use crate::kit::{ImageKind, TestEnv};
use crate::sweep::seeds;

fn kinds() -> Vec<ImageKind> {
    let q = |name| ImageKind::qcow2(name, 512).sized(512 * 160, 512 * 160);
    vec![
        q("512"),
        q("512-lazy").lazy(),
        q("512-tiny-cache").open("l2-cache-size", 1024).open("refcount-cache-size", 2048),
        q("512-backed").backed(50_000),
        ImageKind::qcow2("4k-data", 4096).with_data_file().sized(4096 * 24, 4096 * 24),
        ImageKind::qcow2("16k-ext", 16384).extended().sized(16384 * 8, 16384 * 8),
    ]
}

/// Sends a few random requests of a writer, and applies them to `model`.
async fn requests(image: &Image, kind: &ImageKind, chance: &mut Chance, model: &mut [u8]) {
    for _ in 0..chance.between(1, 5) {
        let max = kind.cluster * 6;
        let at = chance.below(kind.len - max);
        let index = usize::try_from(at).unwrap();
        let len = usize::try_from(chance.between(1, max)).unwrap();
        match chance.below(8) {
            0 => {
                let flags = ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK;
                let done = image.node.write_zeroes(at, len as u64, flags).await.unwrap();
                if done == Attempt::Done {
                    model[index..index + len].fill(0);
                }
            }
            1 if kind.has_compression => {
                let at = at / kind.cluster * kind.cluster;
                let (index, len) = (usize::try_from(at).unwrap(), kind.cluster);
                let bytes = vec![chance.draw().to_le_bytes()[0]; usize::try_from(len).unwrap()];
                let iov = Buf::from_slice(&bytes).iov();
                image.node.write_compressed(at, iov).await.unwrap();
                model[index..index + bytes.len()].copy_from_slice(&bytes);
            }
            2 => image.flush().await.unwrap(),
            _ => {
                let bytes = pattern(chance.draw(), at, len);
                image.write(at, &bytes).await.unwrap();
                model[index..index + len].copy_from_slice(&bytes);
            }
        }
    }
}

fn options(chance: &mut Chance) -> Options {
    let all = [
        json!({}),
        json!({"lazy-refcounts": false}),
        json!({"overlap-check": "all"}),
        json!({"overlap-check": "constant", "decompressed-cache-size": 1024}),
        json!({"l2-cache-size": 2048, "refcount-cache-size": 4096}),
        json!({"data-before-metadata": true, "pass-discard-other": true}),
    ];
    let index = usize::try_from(chance.below(all.len() as u64)).unwrap();
    Options::from_json(all[index].clone()).unwrap()
}

async fn same(image: &Image, model: &[u8], what: &str) {
    let read = image.read(0, model.len()).await.unwrap_or_else(|e| panic!("{what}: {e}"));
    let differs = read.iter().zip(model).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: the first byte that differs");
}

async fn play(env: &TestEnv, kind: &ImageKind, seed: u64) {
    let mut chance = Chance::new(seed);
    let mut image = Image::open(env, kind, writer()).await.unwrap();
    let mut model = image.read(0, usize::try_from(kind.len).unwrap()).await.unwrap();
    for step in 0..14 {
        let what = format!("{} seed {seed} step {step}", kind.name);
        requests(&image, kind, &mut chance, &mut model).await;
        match chance.below(4) {
            0 => {
                let files_first = chance.one_in(2);
                let options = options(&mut chance);
                image.reopen_in_order(read_only(writer()), options, files_first).await.unwrap();
                same(&image, &model, &what).await;
                assert_eq!(image.check().await, 0, "{what}");
                image.reopen(writer(), Options::new()).await.unwrap();
            }
            1 => {
                image.inactivate().await.unwrap();
                let other = Image::open(env, kind, writer()).await.unwrap();
                same(&other, &model, &what).await;
                requests(&other, kind, &mut chance, &mut model).await;
                other.close().await.unwrap();
                image.activate().await.unwrap();
            }
            2 => image.reopen(writer(), options(&mut chance)).await.unwrap(),
            _ => {}
        }
        same(&image, &model, &what).await;
    }
    assert_eq!(image.check().await, 0, "{} seed {seed}", kind.name);
    image.close().await.unwrap();
}

#[test]
fn random_changes_between_random_requests_lose_no_byte() {
    let img = qemu_img();
    let scratch = Scratch::new();
    for kind in kinds() {
        for seed in seeds(12) {
            let sim = Sim::new(seed, SimConfig::default());
            let env = TestEnv::Sim(sim.clone());
            env.make(&kind);
            sim.block_on(play(&env, &kind, seed));
            if let Some(img) = img.as_ref().filter(|_| seed % 8 == 0) {
                let out = env.qemu_check(img, &kind, &scratch);
                assert_eq!(out.code, 0, "{} seed {seed}: {out:?}", kind.name);
            }
        }
    }
}
