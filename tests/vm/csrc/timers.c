// SPDX-License-Identifier: GPL-2.0-or-later
/* Calls setitimer exactly as often as it is told to; no timer is started. usage: timers TIMES */
#include <stdlib.h>
#include <sys/time.h>

int main(int argc, char **argv)
{
	int times = argc > 1 ? atoi(argv[1]) : 0;
	struct itimerval never = {};

	while (times-- > 0)
		setitimer(ITIMER_REAL, &never, NULL);
	return 0;
}
