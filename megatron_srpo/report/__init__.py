"""What did the policy do?   run folders -> one page, a terminal's tree, pictures and tables"""
