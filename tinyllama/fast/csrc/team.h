/* How many threads a parallel region gets: all, or one while others come late.
 *
 * A region ends when its last thread is done. On a busy machine the system may put a thread aside for
 * milliseconds, while a region takes a tenth of one: with two programs spinning on two cores, waiting cost up to
 * 98% of the time. So each region measures how long its first thread waited for the rest. If that was
 * long, regions run on one thread for LONELY times as long, and then try again; each failed try doubles that time.
 *
 *     struct team team = gather();
 *     #pragma omp parallel num_threads(team.threads)
 *     {
 *         ... a loop with nowait ...
 *         arrive(&team);
 *     }
 *     dismiss(&team);
 */

#pragma once

struct team {
    int threads;
    double began, arrived; /* seconds; when the region began, and when its first thread had done its work */
};

struct team gather(void);
void arrive(struct team *team);
void dismiss(const struct team *team);
