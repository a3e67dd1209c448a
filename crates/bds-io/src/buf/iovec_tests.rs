//! Compares scatter lists with a plain `Vec<u8>`.

use std::ops::Range;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, proptest};

use super::IoVec;
use crate::Buf;

/// A list of separate buffers and the bytes it must hold.
fn lists() -> impl Strategy<Value = (IoVec, Vec<u8>)> {
    vec(vec(any::<u8>(), 0..300), 0..6).prop_map(|parts| {
        let list = parts.iter().map(|part| Buf::from_slice(part).iov()).collect();
        (list, parts.concat())
    })
}

fn range_in(len: usize, a: usize, b: usize) -> Range<usize> {
    let (a, b) = (a % (len + 1), b % (len + 1));
    a.min(b)..a.max(b)
}

fn bytes(list: &IoVec) -> Vec<u8> {
    list.to_vec(0..list.len())
}

/// Miri is slow; a few cases already visit every line.
fn config() -> proptest::test_runner::Config {
    let cases = if cfg!(miri) { 4 } else { 256 };
    let persistence = None;
    proptest::test_runner::Config { cases, failure_persistence: persistence, ..Default::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn slice_shows_the_same_bytes((list, model) in lists(), a: usize, b: usize) {
        let range = range_in(model.len(), a, b);
        let part = list.slice(range.clone());
        prop_assert_eq!(part.len(), range.len());
        prop_assert_eq!(part.is_empty(), range.is_empty());
        prop_assert_eq!(bytes(&part), &model[range]);
        prop_assert!(part.segments().iter().all(|seg| !seg.is_empty()));
    }

    #[test]
    fn split_and_push_are_inverse((list, model) in lists(), at: usize) {
        let at = at % (model.len() + 1);
        let mut head = list.clone();
        let tail = head.split_off(at);
        prop_assert_eq!(bytes(&head), &model[..at]);
        prop_assert_eq!(bytes(&tail), &model[at..]);
        head.push(tail);
        prop_assert_eq!(bytes(&head), model);
        prop_assert_eq!(head.segments().len(), list.segments().len());
    }

    #[test]
    fn copy_in_and_out((list, mut model) in lists(), a: usize, b: usize, seed: u8) {
        let range = range_in(model.len(), a, b);
        let data: Vec<u8> = (0..=255u8).cycle().take(range.len()).map(|at| at.wrapping_mul(31) ^ seed).collect();
        list.copy_from(range.start, &data);
        model[range.clone()].copy_from_slice(&data);
        prop_assert_eq!(bytes(&list), &model[..]);
        prop_assert_eq!(list.to_vec(range), data);
    }

    #[test]
    fn copy_between_lists((to, mut model) in lists(), (from, data) in lists(), at: usize) {
        let take = data.len().min(model.len());
        let at = at % (model.len() - take + 1);
        to.copy_from_iov(at, &from.slice(0..take));
        model[at..at + take].copy_from_slice(&data[..take]);
        prop_assert_eq!(bytes(&to), model);
    }

    #[test]
    fn fill_sets_exactly_the_range((list, mut model) in lists(), a: usize, b: usize, byte: u8) {
        let range = range_in(model.len(), a, b);
        list.fill(range.clone(), byte);
        model[range].fill(byte);
        prop_assert_eq!(bytes(&list), model);
    }

    #[test]
    fn is_zero_sees_every_byte(lens in vec(1usize..400, 1..4), at: usize, a: usize, b: usize) {
        let list: IoVec = lens.iter().map(|len| Buf::zeroed(*len, 1).iov()).collect();
        let range = range_in(list.len(), a, b);
        prop_assert!(list.is_zero(range.clone()));
        let at = at % list.len();
        list.copy_from(at, &[1]);
        prop_assert_eq!(list.is_zero(range.clone()), !range.contains(&at));
    }

    #[test]
    fn lists_keep_their_memory_alive((list, model) in lists(), a: usize, b: usize) {
        let range = range_in(model.len(), a, b);
        let part = list.slice(range.clone());
        drop(list);
        prop_assert_eq!(bytes(&part), &model[range]);
    }
}

#[test]
fn neighbours_become_one_segment() {
    let buf = Buf::from_slice(&[1, 2, 3, 4]);
    let mut list = buf.slice(0..2);
    list.push(buf.slice(2..4));
    assert_eq!((list.segments().len(), bytes(&list)), (1, vec![1, 2, 3, 4]));
    list.push(buf.slice(0..1));
    assert_eq!((list.segments().len(), bytes(&list)), (2, vec![1, 2, 3, 4, 1]));
}

#[test]
fn a_vector_becomes_a_list_without_copying() {
    let mut vec = Vec::with_capacity(100);
    vec.extend_from_slice(&[7; 40]);
    let address = vec.as_ptr() as usize;
    let list = IoVec::from(vec);
    assert_eq!(list.segments()[0].as_ptr() as usize, address);
    assert_eq!(bytes(&list), vec![7; 40]);
    assert!(IoVec::from(Vec::new()).is_empty());
}

/// The anchor is anything: here a page that stands for guest memory.
#[test]
fn foreign_memory_lives_as_long_as_its_list() {
    struct GuestPage(
        std::cell::UnsafeCell<[u8; 64]>,
        #[expect(dead_code, reason = "counts")] Arc<()>,
    );
    // SAFETY: the test reaches the bytes through lists only.
    unsafe impl Send for GuestPage {}
    // SAFETY: as above.
    unsafe impl Sync for GuestPage {}
    let alive = Arc::new(());
    let guest = Arc::new(GuestPage(std::cell::UnsafeCell::new([9; 64]), alive.clone()));
    let ptr = guest.0.get().cast::<u8>();
    // SAFETY: 64 bytes live in `guest`, which is the anchor; no references to them are made.
    let list = unsafe { IoVec::from_raw(guest, ptr, 64) };
    let part = list.slice(10..20);
    drop(list);
    assert_eq!(bytes(&part), [9; 10]);
    assert_eq!(Arc::strong_count(&alive), 2);
    drop(part);
    assert_eq!(Arc::strong_count(&alive), 1);
}

#[test]
fn ranges_outside_panic() {
    type Touch = fn(&IoVec);
    let cases: [(&str, Touch); 5] = [
        ("slice", |list| drop(list.slice(3..11))),
        ("copy_to", |list| list.copy_to(8, &mut [0; 3])),
        ("copy_from", |list| list.copy_from(10, &[0])),
        ("fill", |list| list.fill(0..11, 1)),
        ("is_zero", |list| assert!(list.is_zero(11..11))),
    ];
    for (what, touch) in cases {
        let list = IoVec::from(vec![0; 10]);
        let touched = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| touch(&list)));
        assert!(touched.is_err(), "{what}");
    }
}
