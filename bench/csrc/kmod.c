// SPDX-License-Identifier: GPL-2.0-or-later
/* kmod load FILE [PARAM=VALUE...], kmod unload NAME: insmod and rmmod, which a host may lack. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static long load(const char *file, char **params)
{
	char joined[1024] = "";
	size_t used = 0;
	int fd = open(file, O_RDONLY | O_CLOEXEC);

	for (; *params && used < sizeof(joined); params++)
		used += snprintf(joined + used, sizeof(joined) - used, "%s ", *params);
	return fd < 0 ? -1 : syscall(SYS_finit_module, fd, joined, 0);
}

int main(int argc, char **argv)
{
	long failed = -1;

	errno = EINVAL;
	if (argc > 2 && !strcmp(argv[1], "load"))
		failed = load(argv[2], argv + 3);
	else if (argc == 3 && !strcmp(argv[1], "unload"))
		failed = syscall(SYS_delete_module, argv[2], 0);
	if (failed)
		fprintf(stderr, "kmod %s: %s\n", argc > 2 ? argv[2] : "", strerror(errno));
	return failed ? 1 : 0;
}
