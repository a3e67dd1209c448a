//! Codecs: clusters round-trip, damaged input is an error.

use super::*;

const KINDS: [Compression; 2] = [Compression::Deflate, Compression::Zstd];

fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    (0..len)
        .map(|_| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed.to_le_bytes()[3]
        })
        .collect()
}

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|i| b"The quick brown fox "[(i + i / 777) % 20]).collect()
}

fn encoded(kind: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; cluster.len() - 1];
    let len = encode(kind, cluster, &mut out)?;
    out.truncate(len);
    Some(out)
}

#[test]
fn clusters_of_every_size_round_trip() {
    for kind in KINDS {
        for bits in 9..=21 {
            let len = 1 << bits;
            let mut half = text(len);
            half[len / 2..].copy_from_slice(&noise(len / 2, 3));
            for cluster in [vec![0; len], vec![0xa5; len], text(len), half] {
                let mut stored = encoded(kind, &cluster).expect("it compresses");
                assert!(stored.len() < len);
                stored.extend(noise(600, 9)); // the rest of the last sector is anything
                let mut back = vec![1; len];
                decode(kind, &stored, &mut back).unwrap();
                assert!(back == cluster, "{kind:?} {bits}");
                let mut part = vec![1; len / 3 + 1];
                decode(kind, &stored, &mut part).unwrap();
                assert!(part == cluster[..part.len()], "{kind:?} {bits}");
            }
        }
    }
}

#[test]
fn incompressible_clusters_are_not_encoded() {
    for kind in KINDS {
        for len in [512, 4096, 65536, 1 << 21] {
            assert_eq!(encoded(kind, &noise(len, 7)), None, "{kind:?} {len}");
        }
        // Random to the histogram, but half of it repeats the other half.
        let mut twice = noise(2048, 11);
        twice.extend_from_within(..);
        let twice = twice.repeat(8);
        assert!(encoded(kind, &twice).is_some_and(|c| c.len() < 8192), "{kind:?}");
    }
}

/// Bytes below 245, as likely as each other: what remains of chance after a cipher with a fault.
fn biased(len: usize, seed: u64, below: u32) -> Vec<u8> {
    let scaled = |byte: u8| u8::try_from(u32::from(byte) * below / 256).unwrap();
    noise(len, seed).into_iter().map(scaled).collect()
}

/// zlib-rs panics over a short buffer when the data hardly shrinks, mostly in small clusters: every
/// size, from no gain to much.
#[test]
fn no_cluster_of_any_size_makes_a_codec_panic() {
    for kind in KINDS {
        for bits in 9..=21 {
            let len: usize = 1 << bits;
            let seeds = if bits <= 13 { 1..=40 } else { 1..=1 };
            for seed in seeds {
                let mut half = text(len);
                half[len / 2..].copy_from_slice(&noise(len / 2, seed));
                let biases = [250, 245, 230, 200, 128].map(|below| biased(len, seed, below));
                for cluster in [noise(len, seed), text(len), half].iter().chain(&biases) {
                    let Some(stored) = encoded(kind, cluster) else { continue };
                    let mut back = vec![0; len];
                    decode(kind, &stored, &mut back).unwrap();
                    assert!(back == *cluster, "{kind:?} {bits} {seed}");
                }
            }
        }
    }
}

/// The longest results that deflate has fit the buffer it is given.
#[test]
fn deflate_never_exceeds_its_bound() {
    for bits in 9..=21 {
        let cluster = noise(1 << bits, 77);
        let mut encoders = Encoders::default();
        let mut out = vec![0; deflate_bound(cluster.len())];
        let len = deflate(&mut encoders, &cluster, &mut out).expect("it fits whatever it is");
        assert!(len > cluster.len() && len <= deflate_bound(cluster.len()), "{bits}: {len}");
    }
}

#[test]
fn codec_panic_resets_codec_state() {
    let mut codecs = Encoders { deflated: vec![1], ..Encoders::default() };
    let outcome: Option<usize> = contain(&mut codecs, |_| panic!("a codec's bug"));
    assert_eq!(outcome, None);
    assert!(codecs.deflated.is_empty(), "the old state is in use");
    assert_eq!(contain(&mut codecs, |_| 7), Some(7));
}

#[test]
fn encode_never_overruns_a_short_buffer() {
    for kind in KINDS {
        for data in [text(65536), noise(65536, 5), [text(32768), noise(32768, 5)].concat()] {
            for space in [0, 1, 2, 100, 5000, 40000] {
                let mut out = vec![0x77; 65535];
                if let Some(len) = encode(kind, &data, &mut out[..space]) {
                    assert!(len <= space);
                }
                assert!(out[space..].iter().all(|b| *b == 0x77));
            }
        }
    }
}

#[test]
fn damaged_input_is_an_error() {
    for kind in KINDS {
        let cluster = text(65536);
        let stored = encoded(kind, &cluster).unwrap();
        let mut out = vec![0; 65536];
        for cut in [0, 1, 2, stored.len() / 2, stored.len() - 2] {
            let error = decode(kind, &stored[..cut], &mut out).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{kind:?} {cut}");
        }
        assert!(decode(kind, &noise(600, 1), &mut out).is_err());
        let mut longer = vec![0; 65537];
        assert!(decode(kind, &stored, &mut longer).is_err(), "too short a stream");
        decode(kind, &stored, &mut out).expect("an error before does not linger");
        assert!(out == cluster);
    }
}

#[test]
fn several_zstd_frames_make_one_cluster() {
    let cluster = text(65536);
    let mut stored = Vec::new();
    for piece in cluster.chunks(10_000) {
        stored.extend(zstd::bulk::compress(piece, 1).unwrap());
    }
    stored.extend([0; 100]);
    let mut out = vec![0; 65536];
    decode(Compression::Zstd, &stored, &mut out).unwrap();
    assert!(out == cluster);
}

#[test]
fn a_frame_that_asks_for_a_huge_window_is_refused() {
    // Magic, no content size, window descriptor for 2^30 bytes, one raw block of one byte.
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 20 << 3, 9, 0, 0, 0x41];
    let error = decode(Compression::Zstd, &frame, &mut [0; 512]).unwrap_err().to_string();
    assert!(error.contains("memory"), "{error}");
}

/// Other writers use windows of 2^15, QEMU reads 2^12.
#[test]
fn f15_wide_windows_are_read_and_narrow_ones_written() {
    let far = noise(20_000, 2);
    let cluster = [far.clone(), vec![0; 5536], far.clone(), vec![1; 20_000]].concat();
    let mut wide = Compress::new_with_window_bits(flate2::Compression::new(6), false, 15);
    let mut stored = vec![0; 65536];
    wide.compress(&cluster, &mut stored, FlushCompress::Finish).unwrap();
    assert!(wide.total_out() < 30_000, "the copy is found 25,536 bytes back");
    let mut out = vec![0; 65536];
    decode(Compression::Deflate, &stored, &mut out).unwrap();
    assert!(out == cluster);

    // Ours, through a decoder that streams with a window of 2^12 only.
    let stored = encoded(Compression::Deflate, &cluster).unwrap();
    let mut narrow = Decompress::new_with_window_bits(false, 12);
    let (mut at, mut back) = (0, Vec::<u8>::new());
    loop {
        let mut piece = [0; 512];
        let before = narrow.total_out();
        let status = narrow.decompress(&stored[at..], &mut piece, FlushDecompress::None).unwrap();
        at = usize::try_from(narrow.total_in()).unwrap();
        back.extend(&piece[..usize::try_from(narrow.total_out() - before).unwrap()]);
        if status == Status::StreamEnd {
            break;
        }
    }
    assert!(back == cluster);
}
