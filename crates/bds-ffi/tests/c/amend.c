/* The job "amend": format options of an image in use change, its bytes stay. */
#include "check.h"

int main(void) {
    char path[512], data[4096], *json;
    bds_context context = new_context();
    bds_node node;
    bds_backend guest;
    bds_job job;
    const char *wider = "{\"job-id\": \"a\", \"node-name\": \"disk\","
                        " \"options\": {\"driver\": \"qcow2\", \"refcount-bits\": 64}}";
    const char *older = "{\"job-id\": \"b\", \"node-name\": \"disk\","
                        " \"options\": {\"driver\": \"qcow2\", \"version\": \"v2\"}}";
    char options[1024];

    in_dir(path, sizeof path, "disk.qcow2");
    OK(bds_image_create(context, path, "qcow2", "size=1M"));
    snprintf(options, sizeof options,
             "driver=qcow2,node-name=disk,file.driver=file,file.filename=%s", path);
    node = new_disk(context, options);
    guest = new_writer(node);
    memset(data, 4, sizeof data);
    OK(bds_pwrite(guest, data, sizeof data, 8192, 0));

    IS(BDS_ERR_OPTION, bds_job_start(context, "amend", "job-id=a", &job));
    IS(BDS_ERR_OPTION, bds_job_start(context, "amend", "job-id=a,node-name=disk", &job));
    OK(bds_job_start(context, "amend", wider, &job));
    OK(bds_job_wait(job, NULL, -1));
    OK(bds_job_unref(job));

    /* What is wrong with the options is the job's error. */
    OK(bds_job_start(context, "amend", older, &job));
    CHECK(bds_job_wait(job, NULL, -1) < 0);
    CHECK(strstr(bds_error_message(), "refcount_bits=16") != NULL);
    OK(bds_job_unref(job));

    memset(data, 0, sizeof data);
    OK(bds_pread(guest, data, sizeof data, 8192, 0));
    CHECK(data[0] == 4 && data[4095] == 4);
    OK(bds_image_check(guest, &json));
    CHECK(has(json, "\"check-errors\":0"));
    OK(bds_backend_unref(guest));
    OK(bds_node_close(node, NULL));
    OK(bds_node_unref(node));
    OK(bds_image_info(context, path, "qcow2", 0, &json));
    CHECK(has(json, "\"refcount-bits\":64"));
    OK(bds_context_unref(context));
    return 0;
}
