/* The log sink: what no call returns reaches it, from one thread, until the context has ended. */
#include <pthread.h>

#include "check.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int count, corrupt, strange;
static pthread_t thread;

static void sink(uint64_t user_data, int32_t level, const char *target, const char *message) {
    pthread_mutex_lock(&lock);
    strange += strncmp(target, "bds", 3) != 0 || strchr(message, '\n') != NULL;
    strange += count > 0 && !pthread_equal(thread, pthread_self());
    strange += level < (int32_t)BDS_LOG_ERROR || level > (int32_t)BDS_LOG_TRACE;
    thread = pthread_self();
    count += user_data == 7;
    corrupt += user_data == 7 && level == (int32_t)BDS_LOG_WARNING &&
               strstr(message, "marked corrupt") != NULL && strstr(message, "disk") != NULL;
    strange += user_data == 8 && level > (int32_t)BDS_LOG_ERROR;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

/* Opens an image that is marked corrupt, which a driver logs. */
static void open_corrupt(bds_context context, const char *path) {
    char options[1024];
    bds_node node;
    snprintf(options, sizeof options,
             "driver=qcow2,node-name=disk,read-only=on,file.driver=file,file.filename=%s", path);
    node = new_disk(context, options);
    OK(bds_node_close(node, NULL));
    OK(bds_node_unref(node));
}

int main(void) {
    bds_context_options options = BDS_CONTEXT_OPTIONS_INIT;
    bds_context context, quiet;
    char path[512];
    FILE *file;
    int before;

    options.log = sink;
    options.log_user_data = 7;
    OK(bds_context_create(&options, &context));
    options.log_user_data = 8;
    options.log_level = BDS_LOG_ERROR;
    OK(bds_context_create(&options, &quiet));

    in_dir(path, sizeof path, "corrupt.qcow2");
    OK(bds_image_create(context, path, "qcow2", "size=1M"));
    file = fopen(path, "r+b");
    CHECK(file && fseek(file, 79, SEEK_SET) == 0 && fputc(2, file) == 2 && fclose(file) == 0);

    /* A driver's message comes from another thread, with its part of the library. */
    open_corrupt(context, path);
    pthread_mutex_lock(&lock);
    while (corrupt == 0)
        pthread_cond_wait(&changed, &lock);
    CHECK(!pthread_equal(thread, pthread_self()));
    pthread_mutex_unlock(&lock);

    /* After the end of its context the sink is not called any more. */
    OK(bds_context_shutdown(context, NULL));
    OK(bds_context_unref(context));
    pthread_mutex_lock(&lock);
    before = count;
    pthread_mutex_unlock(&lock);
    open_corrupt(quiet, path);
    usleep(20000);
    pthread_mutex_lock(&lock);
    CHECK(count == before && strange == 0);
    pthread_mutex_unlock(&lock);
    OK(bds_context_unref(quiet));
    return 0;
}
