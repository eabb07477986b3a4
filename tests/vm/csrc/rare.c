// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What other workloads seldom do: rare COUNT.  Copies from and to user space that fail, and
 * datagrams through a classic BPF filter, which the kernel compiles.  Prints the symbols of text
 * that the kernel has made for itself.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/socket.h>
#include <sys/stat.h>

static int fail_to_copy(void)
{
	void *nowhere = (void *)64;
	char buffer[64];
	int ends[2];

	return pipe(ends) || write(ends[1], nowhere, 5000) != -1 || errno != EFAULT ||
	       write(ends[1], "0123456789", 10) != 10 || read(ends[0], nowhere, 10) != -1 ||
	       read(ends[0], buffer, sizeof(buffer)) < 0 || open(nowhere, O_RDONLY) != -1 ||
	       stat("/", nowhere) != -1 || errno != EFAULT || close(ends[0]) || close(ends[1]);
}

static int filter(long count)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 'x', 0, 1),
		BPF_STMT(BPF_RET | BPF_K, 0xffff),
		BPF_STMT(BPF_RET | BPF_K, 0),
	};
	struct sock_fprog program = { sizeof(code) / sizeof(code[0]), code };
	int pair[2];
	char byte;

	if (socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) ||
	    setsockopt(pair[1], SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)))
		return 1;
	for (long i = 0; i < count; i++) {
		byte = i % 2 ? 'x' : 'y';	/* every other one is dropped */
		if (write(pair[0], &byte, 1) != 1 && byte == 'x')
			return 1;
		if (byte == 'x' && read(pair[1], &byte, 1) != 1)
			return 1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	long count = argc > 1 ? atol(argv[1]) : 1;

	for (long i = 0; i < count; i++)
		if (fail_to_copy())
			return 1;
	if (filter(count))
		return 1;
	execl("/bin/grep", "grep", "-F", "[__builtin__", "/proc/kallsyms", NULL);
	return 1;
}
