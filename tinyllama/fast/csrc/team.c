#include "team.h"

#include <time.h>

int omp_get_max_threads(void); /* as in omp.h, which not every compiler comes with */
int omp_get_thread_num(void);

#define LATE 0.0005  /* seconds that a thread may be late, beside the time that the work takes */
#define LONELY 50    /* times the time lost, for which one thread works: so at most 2% are lost */
#define LONGEST 2.0  /* seconds without another try */
#define PUNCTUAL 0.1 /* seconds in which nobody is late, after which the next time counts as the first */

/* Of each thread that starts regions: until when it works alone, for how long at the next time, since when not. */
static _Thread_local double alone_until, next_pause, together_since;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

struct team gather(void) {
    struct team team = {.began = now()};
    team.threads = team.began < alone_until ? 1 : omp_get_max_threads();
    return team;
}

void arrive(struct team *team) {
    if (omp_get_thread_num() == 0) team->arrived = now();
}

void dismiss(const struct team *team) {
    if (team->threads == 1) return;
    double end = now(), lost = end - team->arrived;
    if (lost > LATE + (team->arrived - team->began)) {
        double pause = LONELY * lost > next_pause ? LONELY * lost : next_pause;
        if (pause > LONGEST) pause = LONGEST;
        alone_until = together_since = end + pause;
        next_pause = 2 * pause;
    } else if (end - together_since > PUNCTUAL) {
        next_pause = 0;
    }
}
