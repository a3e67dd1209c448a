/* Jobs: a mirror that takes over, a stream, verbs and events. */
#include "check.h"

int main(void) {
    char path[512], options[1024], data[4096], *json;
    bds_context context = new_context();
    bds_node source, target, found;
    bds_backend guest;
    bds_job job, other;
    bds_event event;
    uint64_t id, wanted;
    bds_job_info info = BDS_JOB_INFO_INIT;
    int result, finished = 0, ready = 0;

    source = new_disk(context, "driver=mem,node-name=source,size=1M");
    target = new_disk(context, "driver=mem,node-name=target,size=1M");
    guest = new_writer(source);
    memset(data, 4, sizeof data);
    OK(bds_pwrite(guest, data, sizeof data, 8192, 0));

    IS(BDS_ERR_OPTION, bds_job_start(context, "mirror", "device=source,target=target", &job));
    IS(BDS_ERR_UNSUPPORTED, bds_job_start(context, "dance", "job-id=x", &job));
    IS(BDS_ERR_NOT_FOUND,
       bds_job_start(context, "mirror", "job-id=m,device=source,target=nothing", &job));
    OK(bds_job_start(context, "mirror",
                     "job-id=m,device=source,target=target,sync=full,auto-dismiss=off", &job));
    IS(BDS_ERR_EXISTS, bds_job_start(context, "mirror", "job-id=m,device=source,target=target",
                                     &other));
    OK(bds_job_find(context, "m", &other));
    CHECK(other.raw != job.raw);
    OK(bds_job_unref(other));
    IS(BDS_ERR_STALE, bds_job_unref(other));
    OK(bds_job_ref(job, &other));
    OK(bds_job_wait(job, "ready", -1));
    OK(bds_job_set_speed(job, 0));
    OK(bds_job_pause(job));
    OK(bds_job_wait(job, "standby", -1));
    CHECK(bds_job_pause(job) < 0);
    OK(bds_job_get_info(job, &info));
    CHECK(info.state == BDS_JOB_STATE_STANDBY && (info.flags & BDS_JOB_IS_PAUSED) != 0);
    OK(bds_job_resume(job));
    OK(bds_job_set_speed(job, 1 << 30));
    OK(bds_job_get_info(job, &info));
    CHECK(info.speed == 1 << 30 && info.status == 0 && info.progress <= info.total);
    OK(bds_job_query(job, &json));
    CHECK(has(json, "\"mirror\""));
    OK(bds_pwrite(guest, data, sizeof data, 0, 0));
    OK(bds_job_wait(job, "ready", -1));
    OK(bds_job_complete(job));
    OK(bds_job_wait(job, NULL, -1));
    OK(bds_query(context, "jobs", &json));
    CHECK(has(json, "concluded"));
    OK(bds_job_get_info(job, &info));
    CHECK(info.state == BDS_JOB_STATE_CONCLUDED && info.status == 0);
    CHECK(info.total > 0 && info.progress == info.total);
    OK(bds_job_dismiss(job));
    OK(bds_job_get_info(job, &info));
    CHECK(info.state == BDS_JOB_STATE_NULL);
    IS(BDS_ERR_NOT_FOUND, bds_job_dismiss(other));
    OK(bds_query(context, "job-history", &json));
    CHECK(has(json, "\"m\""));
    IS(BDS_ERR_OPTION, bds_job_wait(job, "dancing", 0));
    OK(bds_job_unref(job));
    OK(bds_job_unref(other));

    /* The guest uses the target now, with all that it wrote. */
    OK(bds_backend_node(guest, &found));
    OK(bds_node_id(found, &id));
    OK(bds_node_id(target, &wanted));
    CHECK(id == wanted);
    (void)bds_node_unref(found);
    memset(data, 0, sizeof data);
    OK(bds_pread(guest, data, sizeof data, 0, 0));
    CHECK(data[0] == 4 && data[4095] == 4);
    while ((result = bds_context_next_event(context, &event, NULL)) == 1) {
        ready += event.type == BDS_EVENT_JOB_READY;
        finished += event.type == BDS_EVENT_JOB_FINISHED && event.status == 0;
    }
    OK(result);
    CHECK(ready == 1 && finished == 1);
    OK(bds_backend_unref(guest));

    /* A job that is cancelled. */
    OK(bds_job_start(context, "mirror", "job-id=c,device=source,target=target", &job));
    OK(bds_job_wait(job, "ready", -1));
    IS(-ETIME, bds_job_wait(job, NULL, 1000000));
    IS(BDS_ERR_ARGUMENT, bds_job_cancel(job, 7));
    OK(bds_job_cancel(job, 1));
    IS(BDS_ERR_CANCELLED, bds_job_wait(job, NULL, -1));
    OK(bds_job_get_info(job, &info));
    CHECK(info.status == BDS_ERR_CANCELLED);
    OK(bds_job_unref(job));

    /* An incremental backup: what was written since the bitmap began. */
    {
        bds_backend writer = new_writer(source), reader;
        bds_node copy = new_disk(context, "driver=mem,node-name=copy,size=1M");
        uint64_t dirty;
        OK(bds_bitmap_add(source, "b", 4096, 0));
        memset(data, 8, sizeof data);
        OK(bds_pwrite(writer, data, sizeof data, 65536, 0));
        OK(bds_job_start(context, "backup",
                         "job-id=i,device=source,target=copy,sync=incremental,bitmap=b", &job));
        OK(bds_job_wait(job, NULL, -1));
        OK(bds_job_unref(job));
        OK(bds_bitmap_count(source, "b", &dirty));
        CHECK(dirty == 0);
        reader = new_writer(copy);
        OK(bds_pread(reader, data, sizeof data, 65536, 0));
        CHECK(data[0] == 8 && data[4095] == 8);
        OK(bds_pread(reader, data, sizeof data, 8192, 0));
        CHECK(data[0] == 0);
        OK(bds_backend_unref(reader));
        OK(bds_backend_unref(writer));
        OK(bds_node_unref(copy));
    }

    /* A backup with a record, which is removed at success, and a manifest. */
    {
        char record[512], manifest[512], both[2048];
        bds_node copy = new_disk(context, "driver=mem,node-name=copy2,size=1M");
        in_dir(record, sizeof record, "record");
        in_dir(manifest, sizeof manifest, "manifest");
        IS(BDS_ERR_OPTION, bds_job_start(context, "backup",
                                         "job-id=r,device=source,target=copy2,sync=full,"
                                         "check-target=none", &job));
        IS(BDS_ERR_OPTION, bds_job_start(context, "mirror",
                                         "job-id=r,device=source,target=copy2,sync=full,"
                                         "manifest-note=n", &job));
        snprintf(both, sizeof both,
                 "{\"job-id\": \"r\", \"device\": \"source\", \"target\": \"copy2\","
                 " \"sync\": \"full\", \"record\": \"%s\", \"record-interval\": 65536,"
                 " \"check-target\": \"sample\", \"manifest\": \"%s\","
                 " \"manifest-note\": \"n\", \"auto-dismiss\": false}", record, manifest);
        OK(bds_job_start(context, "backup", both, &job));
        OK(bds_job_wait(job, NULL, -1));
        OK(bds_job_query(job, &json));
        CHECK(has(json, "\"resumed-bytes\":0"));
        OK(bds_job_dismiss(job));
        OK(bds_job_unref(job));
        CHECK(access(record, F_OK) != 0 && access(manifest, F_OK) == 0);
        OK(bds_node_unref(copy));
    }

    /* A new image, finalized by hand. */
    in_dir(path, sizeof path, "new.raw");
    snprintf(options, sizeof options,
             "{\"job-id\": \"n\", \"auto-finalize\": false, \"options\": {\"driver\": \"file\","
             " \"filename\": \"%s\", \"size\": 1048576}}", path);
    OK(bds_job_start(context, "create", options, &job));
    OK(bds_job_wait(job, "pending", -1));
    OK(bds_job_finalize(job));
    OK(bds_job_wait(job, NULL, -1));
    CHECK(access(path, F_OK) == 0);
    OK(bds_job_unref(job));

    (void)bds_node_unref(source);
    (void)bds_node_unref(target);
    OK(bds_context_shutdown(context, NULL));
    OK(bds_context_unref(context));
    return 0;
}
