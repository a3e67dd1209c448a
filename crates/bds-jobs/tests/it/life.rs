//! The life of one job: states, events, what is called and when.

use bds_jobs::JobOptions;

use crate::fake::{Fake, calm, fails, manager, trace};

#[test]
fn a_job_that_succeeds_is_waiting_pending_concluded_and_null() {
    let sim = calm(1);
    let jobs = manager(&sim);
    let mut events = jobs.events();
    let fake = Fake::new();
    let log = fake.log.clone();
    sim.block_on(async {
        let job = jobs.start(JobOptions::new("j"), Box::new(fake)).await.unwrap();
        job.wait().await.unwrap();
    });
    sim.run_until_idle();
    let expected = [
        "j created",
        "j running",
        "j waiting",
        "j pending",
        "j COMPLETED",
        "j concluded",
        "j null",
    ];
    assert_eq!(trace(&mut events), expected);
    assert_eq!(*log.lock().unwrap(), ["plan j", "retire j: committed"]);
    assert!(jobs.query().is_empty());
    assert!(jobs.history().last("j").is_some());
}

#[test]
fn a_job_that_fails_is_aborting_and_says_why() {
    let sim = calm(1);
    let jobs = manager(&sim);
    let mut events = jobs.events();
    let fake = Fake::running(fails("broken"));
    let log = fake.log.clone();
    sim.block_on(async {
        let job = jobs.start(JobOptions::new("j"), Box::new(fake)).await.unwrap();
        assert_eq!(job.wait().await.unwrap_err().to_string(), "broken");
    });
    sim.run_until_idle();
    let expected =
        ["j created", "j running", "j aborting", "j COMPLETED: broken", "j concluded", "j null"];
    assert_eq!(trace(&mut events), expected);
    assert_eq!(*log.lock().unwrap(), ["retire j: broken"]);
}
