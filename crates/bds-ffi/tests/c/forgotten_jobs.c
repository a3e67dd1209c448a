/* Jobs that wait for a user when the last handle goes: they are cancelled, and their files closed. */
#include "check.h"

static char paths[2][512];

static void make_images(void) {
    bds_context context = new_context();
    for (int i = 0; i < 2; i++) {
        in_dir(paths[i], sizeof paths[i], i ? "target.raw" : "source.raw");
        OK(bds_image_create(context, paths[i], "raw", "size=1M"));
    }
    OK(bds_context_unref(context));
}

static bds_node open_image(bds_context context, int number) {
    char options[2048];
    snprintf(options, sizeof options, "driver=file,node-name=disk%d,filename=%s", number,
             paths[number]);
    return new_disk(context, options);
}

/* Whether both images can be locked by another user now. */
static int are_free(void) {
    bds_context context = new_context();
    int opened = 1;
    for (int i = 0; i < 2; i++) {
        char options[2048];
        bds_node node;
        bds_backend writer;
        snprintf(options, sizeof options, "driver=file,filename=%s", paths[i]);
        if (bds_node_open(context, options, &node) != BDS_OK) {
            opened = 0;
            continue;
        }
        if (bds_backend_create_on(node, NULL, &writer) == BDS_OK)
            OK(bds_backend_unref(writer));
        else
            opened = 0;
        (void)bds_node_unref(node);
    }
    OK(bds_context_shutdown(context, NULL));
    OK(bds_context_unref(context));
    return opened;
}

static void forget(const char *type, const char *options, const char *state, int is_paused) {
    bds_context context = new_context();
    bds_node source = open_image(context, 0), target = open_image(context, 1);
    bds_job job;
    OK(bds_job_start(context, type, options, &job));
    OK(bds_job_wait(job, state, -1));
    if (is_paused) {
        OK(bds_job_pause(job));
        OK(bds_job_wait(job, "standby", -1));
    }
    CHECK(!are_free());
    (void)bds_node_unref(source);
    (void)bds_node_unref(target);
    IS(BDS_STILL_REFERENCED, bds_context_unref(context));
    OK(bds_job_unref(job));
    while (!are_free())
        usleep(10000);
}

int main(void) {
    make_images();
    forget("backup", "job-id=j,device=disk0,target=disk1,sync=full,auto-finalize=off", "pending",
           0);
    forget("mirror", "job-id=j,device=disk0,target=disk1,sync=full", "ready", 0);
    forget("mirror", "job-id=j,device=disk0,target=disk1,sync=full", "ready", 1);
    return 0;
}
