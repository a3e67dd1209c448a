//! Random commands at random moments: the job ends exactly once, in a state that fits, and leaves
//! nothing. Sixty seeds by default, `BDS_TEST_BUDGET=full` ten thousand.

use std::time::Duration;

use bds_core::graph::walk;
use bds_jobs::mirror::{Mirror, MirrorOptions};
use bds_jobs::{CopyMode, JobChange, JobEvent, JobOptions, JobStatus};
use bds_testkit::Chance;

use super::kit::{Client, Habits, LEN, World, pattern, writer};

fn random_commands(seed: u64) {
    let world = World::new(seed);
    world.block_on(async {
        let mut chance = Chance::new(seed);
        let bytes = pattern(1, LEN);
        world.put("disk", &bytes);
        world.put("target", &pattern(2, LEN));
        let disk = world.raw("disk").await;
        let source =
            world.open("driver=throttle,node-name=source,limits.bps-total=1T,file=disk").await;
        let target = world.raw("target").await;
        let habits = Habits { seed, slot: 0, of: 1, cell: 2048, unmaps: true, pause_us: 100 };
        let client = Client::new(writer(&source, "client"), bytes, habits).start();
        let replaces = chance.one_in(2);
        let options = MirrorOptions {
            replaces: replaces.then(|| "disk".into()),
            ..MirrorOptions::new(&source, &target, "mirror0")
        };
        let mut events = world.manager.events();
        let mirror = Mirror::prepare(options).await.expect("it can be prepared");
        let options = JobOptions {
            auto_finalize: chance.one_in(2),
            auto_dismiss: chance.one_in(2),
            ..JobOptions::new("mirror0")
        };
        let job = world.manager.start(options, Box::new(mirror)).await.expect("it starts");
        for step in 0..60 {
            // Refusals are part of it.
            let _result = match chance.below(9) {
                0 => job.pause(),
                1 | 2 => job.resume(),
                3 | 4 => job.complete(),
                5 if step > 10 => job.cancel(chance.one_in(3)),
                6 => job.change(JobChange::MirrorCopyMode(CopyMode::WriteBlocking)),
                7 => job.set_speed(chance.below(2) * (64 << 20)),
                8 if step > 10 => job.finalize(),
                _ => Ok(()),
            };
            // Long ones are few: the client goes on meanwhile, which is most of a run's work.
            let us = [0, 50, 2000, 2000, 20_000][usize::try_from(chance.below(5)).expect("small")];
            let us = if chance.one_in(30) { 200_000 } else { us };
            bds_io::sleep(Duration::from_micros(chance.below(us + 1))).await;
        }
        let _ready = job.resume();
        let _refused = job.complete();
        bds_io::sleep(Duration::from_millis(100)).await;
        let _refused = job.cancel(true);
        let result = job.wait().await;
        let mut ends = 0;
        while let Some(event) = events.try_next() {
            match event {
                JobEvent::Cancelled(_) | JobEvent::Completed { .. } => ends += 1,
                _ => {}
            }
        }
        assert_eq!(ends, 1, "seed {seed}: final events");
        assert!(
            matches!(job.status(), JobStatus::Concluded | JobStatus::Null),
            "seed {seed}: {:?}",
            job.status()
        );
        assert_eq!(job.info().cleanup_error, None, "seed {seed}");
        let client = client.stop().await;
        client.check().await.unwrap_or_else(|words| panic!("seed {seed}: {words}"));
        let used = client.backend.node().expect("it has a medium").id();
        let below = walk::next_below(&source).map(|node| node.id());
        match replaces {
            true => assert!(used == source.id() && (below != Some(target.id()) || result.is_ok())),
            false => assert!(used == source.id() || (used == target.id() && result.is_ok())),
        }
        drop(disk);
    });
    world.end();
}

#[test]
fn random_commands_end_a_mirror_exactly_once() {
    for seed in crate::budget::seeds(60, crate::budget::SCHEDULES) {
        random_commands(seed);
    }
}
