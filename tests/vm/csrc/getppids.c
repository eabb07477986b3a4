// SPDX-License-Identifier: GPL-2.0-or-later
/* Calls getppid on two CPUs until it is killed; nothing else in the kernel is as short. */
#include <sys/syscall.h>
#include <unistd.h>

int main(void)
{
	fork();
	for (;;)
		syscall(SYS_getppid);
}
