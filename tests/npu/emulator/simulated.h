/* What the simulated runtime and its graphs know of one another. */
#include <time.h>

#include "acl/acl.h"

#pragma GCC visibility push(hidden)

typedef struct {
    struct timespec when;
    int external; /* may be waited for before it is recorded, as graphs do */
    int recorded;
} Event;

enum Kind { OPERATION, WAIT, RESET };

int is_capturing(aclrtStream stream); /* NULL: any */
aclError capture_event(aclrtEvent event, enum Kind kind);
aclError refuse(const char *why); /* says so in aclGetRecentErrMsg, and spoils the capture under way */
const char *last_words(void);

#pragma GCC visibility pop
