//! Alternates an image between this library and QEMU's tools, on files of the host.

use bds_core::{ErrorKind, Options};
use bds_io::EngineKind;
use bds_testkit::{pattern, qemu_img, qemu_io};

use super::driver_stack::{Image, read_only, writer};
use crate::kit::{ImageKind, TestEnv};

fn kinds() -> Vec<ImageKind> {
    let q = |name| ImageKind::qcow2(name, 65536).sized(1 << 22, 1 << 23);
    vec![q("plain"), q("lazy").lazy(), q("v2").version_2(), q("backed").backed(1_000_000)]
}

#[test]
fn qemu_writes_to_an_inactivated_image_and_activation_reads_it() {
    let (Some(img), Some(io)) = (qemu_img(), qemu_io()) else { return };
    for kind in kinds() {
        let env = TestEnv::host(EngineKind::Pool).unwrap();
        env.make(&kind);
        let path = env.path("disk");
        let path = path.to_str().unwrap();
        let write = |pattern: &str| io.run(["-f", "qcow2", "-c", pattern, path]);
        let mut image = env.block_on(Image::open(&env, &kind, writer())).unwrap();
        let mut expected = pattern(1, 0, 300_000);
        env.block_on(async {
            image.write(0, &expected).await.unwrap();
            image.flush().await.unwrap();
        });
        let refused = write("write -P 1 0 64k");
        assert!(format!("{refused:?}").contains("Is another process using"), "{refused:?}");

        env.block_on(image.inactivate()).unwrap();
        let checked = img.run(["check", "-f", "qcow2", path]);
        assert_eq!(checked.code, 0, "{}: {checked:?}", kind.name);
        for step in ["write -P 0x5a 100k 150k", "write -P 0x33 3M 64k", "discard 512k 128k"] {
            let done = write(step);
            assert!(done.ok() && !done.stdout.contains("failed"), "{}: {done:?}", kind.name);
        }
        img.must(["resize", "-q", "-f", "qcow2", path, "6M"]);
        expected[102_400..256_000].fill(0x5a);

        env.block_on(async {
            image.activate().await.unwrap();
            assert_eq!(image.node.len(), 6 << 20);
            assert!(image.read(0, 300_000).await.unwrap() == expected, "{}", kind.name);
            assert!(image.read(3 << 20, 65536).await.unwrap() == [0x33; 65536], "{}", kind.name);
            assert!(image.read(5 << 20, 65536).await.unwrap() == [0; 65536], "{}", kind.name);
            image.write((5 << 20) + 1000, &[0x44; 100_000]).await.unwrap();
            image.reopen(read_only(writer()), Options::new()).await.unwrap();
        });
        // Readers are allowed, and find it clean; a writer is refused.
        let checked = img.run(["check", "-f", "qcow2", path]);
        assert_eq!(checked.code, 0, "{}: {checked:?}", kind.name);
        let read = io.run(["-r", "-f", "qcow2", "-c", "read -P 0x44 5243880 100000", path]);
        assert!(read.ok() && !read.stdout.contains("failed"), "{}: {read:?}", kind.name);
        assert!(!write("write 0 64k").ok(), "{}", kind.name);

        env.block_on(async {
            image.reopen(writer(), Options::new()).await.unwrap();
            image.write(0, &[1; 65536]).await.unwrap();
            image.close().await.unwrap();
        });
        let checked = img.run(["check", "-f", "qcow2", path]);
        assert_eq!(checked.code, 0, "{}: {checked:?}", kind.name);
        let read = io.run(["-r", "-f", "qcow2", "-c", "read -P 1 0 64k", path]);
        assert!(read.ok() && !read.stdout.contains("failed"), "{}: {read:?}", kind.name);
    }
}

/// QEMU changed the image's header meanwhile: it is not activated.
#[test]
fn activation_refuses_an_image_that_qemu_changed() {
    let Some(img) = qemu_img() else { return };
    let kind = ImageKind::qcow2("v2", 65536).version_2();
    let env = TestEnv::host(EngineKind::Pool).unwrap();
    env.make(&kind);
    let path = env.path("disk");
    let path = path.to_str().unwrap();
    let image = env.block_on(Image::open(&env, &kind, writer())).unwrap();
    env.block_on(async {
        image.write(0, &[1; 65536]).await.unwrap();
        image.inactivate().await.unwrap();
    });
    img.must(["amend", "-f", "qcow2", "-o", "compat=1.1", path]);
    let error = env.block_on(image.activate()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
    assert!(error.to_string().contains("version"), "{error}");
    // QEMU may still open it: none of our locks is left.
    img.must(["amend", "-f", "qcow2", "-o", "compat=0.10", path]);
    env.block_on(async {
        image.activate().await.unwrap();
        assert_eq!(image.read(0, 65536).await.unwrap(), [1; 65536]);
        image.close().await.unwrap();
    });
}
