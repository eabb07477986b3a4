// SPDX-License-Identifier: GPL-2.0-or-later
/* Two processes that call getppid, which does next to nothing, until they are killed. */
#include <sys/syscall.h>
#include <unistd.h>

int main(void)
{
	fork();
	for (;;)
		syscall(SYS_getppid);
}
