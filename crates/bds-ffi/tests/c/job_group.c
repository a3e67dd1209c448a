/* Jobs that start as one transaction, at one point in time with the edits of a change. */
#include "check.h"

static char byte_at(bds_context context, const char *name, uint64_t offset) {
    bds_node node;
    bds_backend reader;
    char byte;
    OK(bds_node_find(context, name, &node));
    OK(bds_backend_create_on(node, NULL, &reader));
    OK(bds_pread(reader, &byte, 1, offset, 0));
    (void)bds_backend_unref(reader);
    (void)bds_node_unref(node);
    return byte;
}

#define BACKUP(id, from, to) \
    "{\"type\": \"backup\", \"job-id\": \"" id "\", \"device\": \"" from "\", \"target\": \"" to \
    "\", \"sync\": \"full\", \"auto-dismiss\": false}"

int main(void) {
    bds_context context = new_context(), elsewhere = new_context();
    bds_node disks[2], targets[2], overlay;
    bds_backend guests[2], drive;
    bds_change change, foreign, none = {0};
    bds_job jobs[2], other;
    uint64_t dirty;
    char byte = 1, *json, path[512], options[1024];

    for (int i = 0; i < 2; i++) {
        disks[i] = new_disk(context, i ? "driver=mem,node-name=d1,size=1M"
                                       : "driver=mem,node-name=d0,size=1M");
        targets[i] = new_disk(context, i ? "driver=mem,node-name=t1,size=1M"
                                         : "driver=mem,node-name=t0,size=1M");
        guests[i] = new_writer(disks[i]);
        OK(bds_pwrite(guests[i], &byte, 1, 0, 0));
    }

    /* What is wrong is said before anything begins. */
    OK(bds_change_create(context, &change));
    OK(bds_change_create(elsewhere, &foreign));
    IS(BDS_ERR_JSON, bds_job_start_group(context, "{}", none, jobs, 2));
    IS(BDS_ERR_JSON, bds_job_start_group(context, "[1]", none, jobs, 2));
    IS(BDS_ERR_JSON, bds_job_start_group(context, "[{\"job-id\": \"a\"}]", none, jobs, 2));
    IS(BDS_ERR_ARGUMENT, bds_job_start_group(context, "[]", none, jobs, 2));
    IS(BDS_ERR_ARGUMENT, bds_job_start_group(
        context, "[" BACKUP("a", "d0", "t0") "," BACKUP("a", "d1", "t1") "]", none, jobs, 2));
    IS(BDS_ERR_ARGUMENT, bds_job_start_group(
        context, "[" BACKUP("a", "d0", "t0") "," BACKUP("b", "d1", "t1") "]", none, jobs, 1));
    IS(BDS_ERR_ARGUMENT, bds_job_start_group(
        context, "[" BACKUP("a", "d0", "t0") "]", foreign, jobs, 2));
    IS(BDS_ERR_UNSUPPORTED, bds_job_start_group(
        context, "[{\"type\": \"stream\", \"job-id\": \"s\", \"device\": \"d0\"}]", change, jobs, 2));
    /* The second cannot start: the first leaves nothing behind. */
    IS(BDS_ERR_NOT_FOUND, bds_job_start_group(
        context, "[" BACKUP("a", "d0", "t0") "," BACKUP("b", "d1", "nothing") "]", none, jobs, 2));
    /* The change is impossible: no job begins, the edits are kept. */
    OK(bds_change_bitmap_add(change, disks[0], "since", 0, 0));
    OK(bds_change_rename(change, disks[1], "d0"));
    IS(BDS_ERR_EXISTS, bds_job_start_group(
        context, "[" BACKUP("a", "d0", "t0") "," BACKUP("b", "d1", "t1") "]", change, jobs, 2));
    IS(BDS_ERR_EXISTS, bds_change_commit(change, NULL));
    IS(BDS_ERR_NOT_FOUND, bds_bitmap_count(disks[0], "since", &dirty));
    OK(bds_query(context, "jobs", &json));
    CHECK(has(json, "[]"));
    OK(bds_node_query(disks[0], &json));
    CHECK(has(json, "\"job\":null"));

    /* Two backups, two new bitmaps, an overlay, and a drive that gets another medium: one moment. */
    OK(bds_change_clear(change));
    in_dir(path, sizeof path, "overlay.qcow2");
    OK(bds_image_create(context, path, "qcow2", "size=1M"));
    snprintf(options, sizeof options,
             "driver=qcow2,node-name=overlay,file.driver=file,file.filename=%s", path);
    overlay = new_disk(context, options);
    OK(bds_backend_create(context, NULL, &drive));
    OK(bds_change_bitmap_add(change, disks[0], "since", 0, 0));
    OK(bds_change_bitmap_add(change, disks[1], "since", 0, 0));
    OK(bds_change_append(change, disks[1], overlay));
    OK(bds_change_insert(change, drive, targets[0]));
    OK(bds_job_start_group(
        context, "[" BACKUP("a", "d0", "t0") "," BACKUP("b", "d1", "t1") "]", change, jobs, 2));
    /* What is written now is in no copy, but in the bitmap of the disk that it went to. */
    byte = 2;
    OK(bds_pwrite(guests[0], &byte, 1, 0, 0));
    OK(bds_pwrite(guests[1], &byte, 1, 0, 0));
    OK(bds_job_wait(jobs[0], NULL, -1));
    OK(bds_job_wait(jobs[1], NULL, -1));
    CHECK(byte_at(context, "t0", 0) == 1 && byte_at(context, "t1", 0) == 1);
    CHECK(byte_at(context, "overlay", 0) == 2 && byte_at(context, "d1", 0) == 1);
    OK(bds_bitmap_count(disks[0], "since", &dirty));
    CHECK(dirty > 0);
    OK(bds_query(context, "bitmaps", &json));
    CHECK(strstr(json, "\"node\":\"d0\"") && has(json, "since"));
    OK(bds_query(context, "job-facts", &json));
    CHECK(has(json, "\"auto-dismiss\":false"));
    OK(bds_query(context, "block-jobs", &json));
    CHECK(has(json, "\"device\":\"a\""));
    IS(BDS_ERR_EXISTS, bds_job_start_group(
        context, "[" BACKUP("a", "d0", "t0") "]", none, NULL, 0));
    OK(bds_job_dismiss(jobs[0]));
    OK(bds_job_dismiss(jobs[1]));
    OK(bds_job_unref(jobs[0]));
    OK(bds_job_unref(jobs[1]));
    OK(bds_change_commit(change, NULL)); /* it is empty */

    /* A group ends together: what one of them is cancelled for, both are. */
    OK(bds_job_start_group(context,
                           "[{\"type\": \"mirror\", \"job-id\": \"m\", \"device\": \"d0\","
                           " \"target\": \"t1\"},"
                           " {\"type\": \"create\", \"job-id\": \"c\", \"auto-dismiss\": false,"
                           " \"options\": {\"driver\": \"file\", \"filename\": \"/nonexistent/x\","
                           " \"size\": 1048576}}]",
                           none, NULL, 0));
    OK(bds_job_find(context, "c", &other));
    CHECK(bds_job_wait(other, NULL, -1) < 0);
    OK(bds_job_dismiss(other));
    OK(bds_job_unref(other));
    IS(BDS_ERR_NOT_FOUND, bds_job_find(context, "m", &other));

    /* Options of a running job. */
    OK(bds_job_start(context, "mirror", "job-id=m,device=d0,target=t1", &other));
    OK(bds_job_wait(other, "ready", -1));
    IS(BDS_ERR_OPTION, bds_job_change(other, "copy-mode=dancing"));
    IS(BDS_ERR_OPTION, bds_job_change(other, "speed=7"));
    OK(bds_job_change(other, "copy-mode=write-blocking"));
    CHECK(bds_job_change(other, "copy-mode=background") < 0); /* not back */
    OK(bds_job_cancel(other, 1));
    IS(BDS_ERR_CANCELLED, bds_job_wait(other, NULL, -1));
    OK(bds_job_unref(other));

    OK(bds_change_unref(change));
    OK(bds_change_unref(foreign));
    for (int i = 0; i < 2; i++)
        (void)bds_backend_unref(guests[i]);
    (void)bds_backend_unref(drive);
    (void)bds_node_unref(overlay);
    for (int i = 0; i < 2; i++) {
        (void)bds_node_unref(disks[i]);
        (void)bds_node_unref(targets[i]);
    }
    OK(bds_context_shutdown(context, NULL));
    OK(bds_context_unref(context));
    OK(bds_context_unref(elsewhere));
    return 0;
}
