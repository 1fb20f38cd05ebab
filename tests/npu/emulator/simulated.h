/* What the simulated runtime and its graphs know of one another. */
#include "acl/acl.h"

#pragma GCC visibility push(hidden)

int is_capturing(aclrtStream stream); /* NULL: any */
aclError refuse(const char *why);     /* says so in aclGetRecentErrMsg, and spoils the capture under way */
const char *last_words(void);

#pragma GCC visibility pop
