// SPDX-License-Identifier: GPL-2.0-or-later
/* Calls sched_rr_get_interval exactly as often as it is told to. usage: calls TIMES */
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>

int main(int argc, char **argv)
{
	int times = argc > 1 ? atoi(argv[1]) : 0;
	struct timespec ts;

	while (times-- > 0)
		syscall(SYS_sched_rr_get_interval, 0, &ts);
	return 0;
}
