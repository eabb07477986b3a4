// SPDX-License-Identifier: GPL-2.0-or-later
/* insmod and rmmod without kmod's files: kmodctl load FILE | unload NAME; prints the errno's name. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <sys/syscall.h>

int main(int argc, char **argv)
{
	long ret = -1;
	int fd;

	if (argc != 3)
		return 2;
	if (!strcmp(argv[1], "load")) {
		fd = open(argv[2], O_RDONLY | O_CLOEXEC);
		if (fd >= 0)
			ret = syscall(SYS_finit_module, fd, "", 0);
	} else {
		ret = syscall(SYS_delete_module, argv[2], O_NONBLOCK);
	}
	puts(ret ? strerrorname_np(errno) : "ok");
	return ret ? 1 : 0;
}
