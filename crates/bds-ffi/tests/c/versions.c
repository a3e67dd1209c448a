/* The header and the library are of one version, and say what the library can do. */
#include "check.h"

int main(void) {
    char text[32];
    CHECK(bds_version_number() == BDS_VERSION_NUMBER);
    snprintf(text, sizeof text, "%d.%d.%d", BDS_VERSION_MAJOR, BDS_VERSION_MINOR, BDS_VERSION_PATCH);
    CHECK(strcmp(bds_version_string(), text) == 0);
    IS(1, bds_has_feature("qcow2"));
    IS(1, bds_has_feature("queue"));
    IS(0, bds_has_feature("time-travel"));
    IS(BDS_ERR_ARGUMENT, bds_has_feature(NULL));
    IS(BDS_ERR_UTF8, bds_has_feature("\xff"));
    return 0;
}
