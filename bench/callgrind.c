// Says to callgrind, from within the process that it watches, what to count.

#include <valgrind/callgrind.h>

void callgrind_start(void) { CALLGRIND_START_INSTRUMENTATION; }

// Ends a part of the run: its counts go to a file that bears the label, and start at zero again.
void callgrind_dump(const char *label) { CALLGRIND_DUMP_STATS_AT(label); }
